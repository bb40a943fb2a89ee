"""Processes: the command line, the supervisor, tritonserver, health."""
