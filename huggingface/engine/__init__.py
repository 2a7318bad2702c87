"""Token-by-token generation on one loaded model. Must not know HTTP, JSON or the registry."""
