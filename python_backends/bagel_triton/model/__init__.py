"""What BAGEL computes: tensors in, tensors out, no requests and no serving."""
