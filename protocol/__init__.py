"""What both sides must agree on; imports nothing else of ours."""
