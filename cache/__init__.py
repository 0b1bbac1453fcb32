"""Caches on both ends, and the one owner of llama.cpp; knows neither the broker nor a session."""
