"""An OpenAI-compatible server: one engine, many requests and adapters."""
