"""OpenAI's interface over the client of a served pipeline."""
