"""Token-by-token generation. Knows nothing of HTTP, JSON or the registry; works on one loaded model."""
