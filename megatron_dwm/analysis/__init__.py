"""What a run has recorded: read, described and drawn."""
