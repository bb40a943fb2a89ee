"""The OpenAI-compatible proxy: thin, stateless, and free of model knowledge."""
