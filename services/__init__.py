"""SLOs-Serve: the four services, their shared plumbing and the pure scheduling core."""
