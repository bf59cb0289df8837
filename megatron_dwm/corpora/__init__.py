"""Corpora made of what is installed, and datasets made of text."""
