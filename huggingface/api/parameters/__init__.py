"""What a caller may ask of generation and of each task, and which of it is in effect."""
