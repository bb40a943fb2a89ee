"""What makes the network fast, and its rows independent of their batch, on a CPU."""
