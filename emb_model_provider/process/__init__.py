"""The process: sockets, signals, supervision, and the application under uvicorn."""
