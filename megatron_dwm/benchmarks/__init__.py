"""Benchmarks: what weighting is worth, and what it costs."""
