"""How the weighter is learnt: alignment of gradients, and the outer update."""
