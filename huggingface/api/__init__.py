"""Everything HTTP: requests, errors, routes. Nothing below this package knows HTTP."""
