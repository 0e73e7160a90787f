"""The service on a cluster of machines, run by an engine that exists."""
