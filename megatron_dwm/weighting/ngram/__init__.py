"""The n-gram weighter: it scores a sample by its n-grams of tokens."""

MODEL_TYPE = "dwm_ngram"
"""transformers' name of its architecture; here, because the modules with its classes import transformers."""
