"""Computes a step with torch: the runner, its cache, its products and its attention."""
