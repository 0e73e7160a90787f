"""Token batches in, vectors out; and how the files of a repository are read."""
