"""Where the run happens: device, process groups, seeds, metrics."""
