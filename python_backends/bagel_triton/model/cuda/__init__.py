"""What makes the network fast on a GPU."""
