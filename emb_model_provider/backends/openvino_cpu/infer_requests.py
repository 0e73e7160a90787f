"""The infer requests of a compiled graph, and which of them runs a batch."""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from emb_model_provider.concurrency import start_thread
from emb_model_provider.errors import ThreadLimitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

logger = logging.getLogger(__name__)

SHORT_LENGTHS = (16, 32)
"""Lengths that a short input is padded to if no other batch is running."""
_USES_BEFORE_COMPILING = 8
"""A process that embeds a few texts ends sooner than compiling pays."""
LATENCY_TOKENS = 1024
"""Padded tokens of lone batches after which the latency request pays, on two processors: it saves 60 µs for each, and takes 0.2 s
to compile for a model of 22 million parameters (see docs/performance.md). Both are proportional to the size of the model."""


class RequestPool:
    """The infer requests of a model: one per stream, and those for a lone batch, which use all threads."""

    def __init__(
        self, requests: Iterable[Any], latency: LatencyRequest | None = None, short: ShortRequests | None = None
    ) -> None:
        # The request that was returned last is taken first: its buffers are in the processor's caches, and the buffers
        # of requests that are not needed are never allocated.
        self._requests: queue.LifoQueue[Any] | None = queue.LifoQueue()
        for request in requests:
            self._requests.put(request)
        self._latency = latency
        self._short = short
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def acquire(self, rows: int, length: int) -> Iterator[tuple[Any, int]]:
        """Wait for a request, and yield it with the length that its inputs are padded to.

        If no other batch is running, it is a request that uses all threads, if it is compiled; else that of a stream.

        Args:
            rows: Number of inputs.
            length: The longest of them in tokens.
        """
        with self._lock:
            requests = self._requests
            if requests is None:
                raise RuntimeError("the backend is closed")
            is_lone = not self._running
            self._running += 1
        try:
            lone_request = None
            if is_lone and rows == 1 and self._short is not None and (padded := self._short.padded(length)) is not None:
                length = padded
                lone_request = self._short.get(padded)
            if is_lone and self._latency is not None:
                lone_request = lone_request or self._latency.get(rows * length)
            if lone_request is not None:
                yield lone_request, length
                return
            request = requests.get()
            try:
                yield request, length
            finally:
                requests.put(request)
        finally:
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        """Release the requests. Those in use are freed when they are returned."""
        with self._lock:
            self._requests = None
        for each in (self._latency, self._short):
            if each is not None:
                each.close()


class BackgroundCompiler:
    """Compiles graphs of one model on other threads, one at a time."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._compiling = threading.Lock()
        self._closed = False

    def start(self, name: str, compile_graph: Callable[[], None], without_it: str) -> None:
        """Start to compile a graph; `without_it` says in the log what happens if that fails."""

        def run() -> None:
            with self._compiling:
                if not self._closed:
                    try:
                        compile_graph()
                    except RuntimeError as error:
                        logger.warning("%s: %s", without_it, error)

        # Not a daemon: a process that ends while OpenVINO compiles can crash.
        thread = threading.Thread(target=run, name=name)
        try:
            start_thread(thread)
        except ThreadLimitError as error:
            logger.warning("%s: %s", without_it, error)
        else:
            self._threads.append(thread)

    def close(self) -> None:
        """Compile nothing that has not begun, and wait until nothing is being compiled."""
        self._closed = True
        for thread in self._threads:
            thread.join()


class LatencyRequest:
    """An infer request that uses all threads for a lone batch of any shape.

    It is compiled in the background when lone batches have had `LATENCY_TOKENS`, so that a service starts sooner, and takes
    less memory until then. Streams run these batches meanwhile.
    """

    def __init__(self, compile_request: Callable[[], Any], background: BackgroundCompiler | None) -> None:
        """Create it; compile it at once if `background` is None."""
        self._compile_request = compile_request
        self._background = background
        self._request = compile_request() if background is None else None
        self._tokens = 0

    def get(self, tokens: int) -> Any | None:
        """Return the request for a lone batch of `tokens`, or None as long as it is not compiled. For one thread at a time."""
        if self._request is None and self._background is not None and self._tokens < LATENCY_TOKENS:
            self._tokens += tokens
            if self._tokens >= LATENCY_TOKENS:
                self._background.start("compile-latency", self._compile, "a lone batch does not use all threads")
        return self._request

    def close(self) -> None:
        if self._background is not None:
            self._background.close()
        self._request = None

    def _compile(self) -> None:
        self._request = self._compile_request()


class ShortRequests:
    """Infer requests for one short input, each for one length.

    When the shape of the inputs changes, OpenVINO prepares each node again, which takes about as long as computing a
    short text with a small model (see docs/performance.md). Each request holds a copy of the matrices. It is compiled in
    the background when it has been needed some times.
    """

    def __init__(
        self,
        compile_length: Callable[[int], Any],
        is_equal: Callable[[Any, int], bool],
        longest: int,
        background: BackgroundCompiler,
    ) -> None:
        """Create it.

        Args:
            compile_length: Compiles the graph for one input of a length, and returns an infer request.
            is_equal: Whether the results of such a request are those of the graph for all shapes. Called on another thread.
            longest: Longest input of the model in tokens.
            background: Compiles the graphs.
        """
        self._compile_length = compile_length
        self._is_equal = is_equal
        self._background = background
        self._lengths = tuple(dict.fromkeys(min(length, longest) for length in SHORT_LENGTHS))
        self._uses = dict.fromkeys(self._lengths, 0)
        self._requests: dict[int, Any] = {}

    def padded(self, length: int) -> int | None:
        """Return the length that a short input is padded to, or None for a long one."""
        return next((each for each in self._lengths if length <= each), None)

    def get(self, length: int) -> Any | None:
        """Return the request for one of the lengths, or None as long as it is not compiled. For one thread at a time."""
        if (request := self._requests.get(length)) is None:
            self._uses[length] += 1
            if self._uses[length] == _USES_BEFORE_COMPILING:
                without_it = f"inputs of up to {length} tokens have no graph of their own"
                self._background.start(f"compile-length-{length}", lambda: self._compile(length), without_it)
        return request

    def close(self) -> None:
        self._background.close()
        self._requests.clear()

    def _compile(self, length: int) -> None:
        request = self._compile_length(length)
        if self._is_equal(request, length):
            self._requests[length] = request
        else:
            logger.info("inputs of up to %d tokens have no graph of their own: its results are different", length)
