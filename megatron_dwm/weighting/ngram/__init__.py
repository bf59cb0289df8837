"""The n-gram weighter: it scores a sample by its n-grams of tokens."""
