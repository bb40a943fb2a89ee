"""Small checkpoints with random weights, in the published layout."""
