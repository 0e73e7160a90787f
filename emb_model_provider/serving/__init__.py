"""Runs one loaded model: tokenization, scheduling, batches, recovery from crashes, and post-processing."""
