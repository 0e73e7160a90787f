"""HTTP: routes, middleware, access and limits. `app.py` wires the parts of the service."""
