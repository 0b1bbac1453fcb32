"""Benchmarks: every figure we state is printed by one of these."""
