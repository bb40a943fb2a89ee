"""Running the server: finding tritonserver, starting and stopping everything, the command line."""
