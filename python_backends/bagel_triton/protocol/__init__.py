"""What travels between processes: requests, messages, events, errors; imports nothing else of ours."""
