"""CPU executor: fast, and each row's result is independent of its batch."""
