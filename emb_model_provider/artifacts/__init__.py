"""Compiled models: found, made, stored, and prepared for loading."""
