"""The autoregressive stage: prefill, text, leases on the KV cache."""
