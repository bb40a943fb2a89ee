"""Contexts: where keys and values live, who may read them, and for how long."""
