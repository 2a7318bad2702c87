"""The documented API: its routes, each with its schemas."""
