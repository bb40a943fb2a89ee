"""Deploy configuration: what runs, where, and how much of it."""
