"""The report: figures and sentences of runs, as one page."""
