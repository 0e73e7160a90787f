"""Models on disk: downloaded, listed, verified and removed, for the service, the command line and Python."""
