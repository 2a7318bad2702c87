"""Which model is in memory: leases, loads, the budget, evictions, and what is kept about them."""
