"""The network: tensors in, tensors out; no requests, no serving."""
