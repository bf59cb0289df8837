"""Analysis of recorded runs: reading, statistics and figures."""
