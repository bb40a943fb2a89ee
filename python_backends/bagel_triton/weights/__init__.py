"""Checkpoint files to tensors, shared between processes."""
