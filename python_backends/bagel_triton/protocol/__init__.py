"""The vocabulary shared by all rooms: requests, messages, events, errors. It imports no other room."""
