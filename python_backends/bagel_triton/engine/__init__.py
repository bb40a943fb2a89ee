"""Scheduling: who computes when. No Triton, and no mathematics of its own."""
