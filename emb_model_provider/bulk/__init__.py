"""Bulk embedding of a file without a server: rows in, parts of vectors out, resumed after any interruption."""
