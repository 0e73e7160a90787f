"""The compiler: turns a snapshot into an artifact. It imports torch, so it runs in a child process of the service."""
