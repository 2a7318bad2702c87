"""The registered models: a JSON file that several processes share."""
