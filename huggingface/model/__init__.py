"""Models in memory: what each is made of, how requests reach it, and how many bytes it takes."""
