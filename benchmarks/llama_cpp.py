"""The server of llama.cpp, in an environment with xllamacpp: `python benchmarks/llama_cpp.py MODEL.gguf PORT`."""

from __future__ import annotations

import signal
import sys

import xllamacpp

_SLOTS = 16
"""Requests that run together."""
_LONGEST = 512
_BATCH = 2048
"""Tokens of a batch."""


def main(model: str, port: int) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.port = port
    parameters.embedding = True
    parameters.n_parallel = _SLOTS
    parameters.n_ctx = _SLOTS * _LONGEST
    parameters.n_batch = parameters.n_ubatch = _BATCH
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    # The server runs in threads of its own, and ends with the process.
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    main(sys.argv[1], int(sys.argv[2]))
