"""The process of the service: sockets, signals, supervision, and the server."""
