"""Processes, devices and logs of a run."""
