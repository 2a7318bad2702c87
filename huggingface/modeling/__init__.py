"""What a transformers model says of itself and takes, for all that compute with it."""
