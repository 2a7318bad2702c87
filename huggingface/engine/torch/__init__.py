"""A step computed by torch: the runner, its cache, and how its products and its attention are computed."""
