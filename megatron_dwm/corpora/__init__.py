"""Corpora of text from installed packages, and datasets preprocessed from text."""
