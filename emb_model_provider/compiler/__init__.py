"""The compiler process: a snapshot becomes an artifact. Imports torch; never imported by the service."""
