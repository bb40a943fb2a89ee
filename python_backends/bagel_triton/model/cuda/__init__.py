"""GPU executor: fused operations, attention over all sequences, CUDA graphs."""
