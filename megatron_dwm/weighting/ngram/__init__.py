"""The n-gram weighter: a sample's score from the n-grams of tokens that are in it."""
