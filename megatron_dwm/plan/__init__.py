"""The plan of a run before it starts: layout, memory, operations, communication, files."""
