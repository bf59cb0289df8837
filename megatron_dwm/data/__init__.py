"""Tokenizers, datasets, samplers and the Batch type."""
