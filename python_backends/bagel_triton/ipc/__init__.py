"""Shared-memory files, locks and descriptors that processes of one server share."""
