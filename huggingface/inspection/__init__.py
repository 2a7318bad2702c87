"""What a model is, told from its config and the heads of its files, before a weight is read."""
