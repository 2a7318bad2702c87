"""Code that all routes share: JSON, origins, validation, errors, streams, and the API's description."""
