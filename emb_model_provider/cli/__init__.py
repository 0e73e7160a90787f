"""The command line: `emb-provider COMMAND`."""
