"""The bi-level method: alignment of gradients, and the outer update of the weighter."""
