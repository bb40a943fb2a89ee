"""The OpenAI-compatible HTTP API: thin and stateless."""
