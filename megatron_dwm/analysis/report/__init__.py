"""The report of runs: figures and text on one HTML page."""
