"""Which model is in memory: leases, loads, the budget, evictions and statistics."""
