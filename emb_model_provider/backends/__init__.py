"""Backends: they run loaded models. Token batch in, vectors out."""
