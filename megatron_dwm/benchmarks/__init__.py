"""Benchmarks of the gain and the cost of weighting."""
