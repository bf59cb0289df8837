"""The data weighting model: scores, weights, alignment, outer update."""
