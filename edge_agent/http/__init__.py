"""The OpenAI-compatible API of an agent: bodies, fair turns, answers as JSON, SSE or WebSocket, a page."""
