"""`strobe serve`: the engine behind OpenAI's HTTP API, and a page to chat with it."""
