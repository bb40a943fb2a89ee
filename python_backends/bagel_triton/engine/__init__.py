"""Scheduling: one thread owns a device and works on many requests; no Triton."""
