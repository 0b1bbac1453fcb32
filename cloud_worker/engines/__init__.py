"""Inference engines behind one `Verifier`; each imports its library at use."""
