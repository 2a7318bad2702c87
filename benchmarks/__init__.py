"""Measures this server against its peers: same machine, same weights, in turn. Run by `make bench`."""
