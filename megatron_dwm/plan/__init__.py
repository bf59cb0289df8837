"""What a run will be, found before it starts: layout, memory, operations, communication, files."""
