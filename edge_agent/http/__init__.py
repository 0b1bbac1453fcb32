"""The OpenAI-compatible API of an agent: bodies, fair admission, answers as JSON, SSE or WebSocket, one page to watch."""
