"""What every route shares: JSON, origins, validation, errors, streams, and the API's description."""
