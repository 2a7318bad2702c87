"""Everything HTTP: the request's shape, its errors, its routes. Nothing below this package knows of HTTP."""
