"""How an arena reaches its consumer; one contract, chosen by name."""
