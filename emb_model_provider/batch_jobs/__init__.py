"""Batches: files, their processing in chunks that survives crashes, and the database of both. Knows no HTTP."""
