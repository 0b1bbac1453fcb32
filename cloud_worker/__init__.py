"""The cloud: picks jobs up, verifies them in one forward pass, replies. Never imports edge_agent."""
