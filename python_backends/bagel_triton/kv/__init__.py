"""KV cache: block pool, prefix cache, leases, connectors."""
