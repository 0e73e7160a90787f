"""The web console at `/console`: pages that show what the service does, and change it through the services of REST."""
