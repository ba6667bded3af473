"""``veneer serve``: an OpenAI-compatible server of one base and many adapters, one for each request."""
