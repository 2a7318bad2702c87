"""A request from its model to its answer: who is active, which model it has, and what its routes work with."""
