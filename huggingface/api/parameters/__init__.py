"""The parameters of generation and of each task, and the rules by which they take effect."""
