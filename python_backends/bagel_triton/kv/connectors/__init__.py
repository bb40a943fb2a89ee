"""Connectors: how KV gets from the thinker to the DiT. One contract in ``base``, chosen by name."""
