"""How a pool reaches its consumer; one contract, chosen by name."""
