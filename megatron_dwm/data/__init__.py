"""Tokenizers, datasets, samplers, loaders and the Batch type."""
