"""Active requests: their lease of a model, their limits, and the services that routes use."""
