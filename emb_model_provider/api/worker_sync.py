"""How several workers serve the same models: the primary publishes them, and the others follow.

Each follower asks the primary over its private socket for what has changed since the version that it has, and waits for
the answer up to a second. Each question tells which version it has applied, and what its requests used meanwhile. A response
of the primary to a request that can change models is sent when all followers have applied the change, so that the next
request of the client gets the same answer from any worker.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emb_model_provider.api.paths import is_inference_request
from emb_model_provider.errors import ProviderError
from emb_model_provider.workers import PRIMARY, socket_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import httpx
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from emb_model_provider.api.batch_service import BatchService
    from emb_model_provider.observability.activity import Activity, Failure, Second
    from emb_model_provider.registry import PublishedModel, Registry
    from emb_model_provider.workers import Worker

logger = logging.getLogger(__name__)

WORKER_URL = "http://worker"
SYNC_PATH = "/sync"
_METRICS_PATH = "/live-metrics"
_METRICS_TIMEOUT_S = 3.0
_POLL_S = 0.1
"""How often the primary checks whether its models have changed, for changes that no request has made."""
_WAIT_S = 1.0
"""How long a follower waits for a change."""
_LEAVING_WAIT_S = 0.05
"""The same while it unloads models, because the primary may wait for this."""
_TIMEOUT_S = 30.0
_RETRY_S = 0.1
_SILENT_S = 30.0
"""A follower that has not asked for this long is no longer waited for: its supervisor ends it if it hangs."""
_RESTARTED_S = 10.0
"""How long a primary that was restarted waits for followers, which can still have models of the previous one."""
_READ_ONLY = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Report:
    """What a follower tells the primary."""

    worker: int
    epoch: str
    """Which process of the primary has published the version; empty at first."""
    applied: int
    """The version that it serves."""
    has_left: bool
    """Whether it has unloaded all models that this version does not have."""
    wait_s: float
    stats: Mapping[str, tuple[int, float | None, list[tuple[float, float]]]]
    seconds: Mapping[int, Second]
    failures: Sequence[Failure]


@dataclass(frozen=True, slots=True)
class Published:
    """What the primary tells its followers."""

    epoch: str
    version: int
    models: tuple[PublishedModel, ...]
    has_batches: bool
    """Whether the database of batches is open, so that all workers work on them."""


@dataclass(slots=True)
class _FollowerState:
    applied: int = 0
    has_left: bool = False
    heard_at: float = field(default_factory=time.monotonic)
    is_gone: bool = False


class Primary:
    """The side of the primary worker. Used on the event loop."""

    def __init__(
        self, worker: Worker, registry: Registry, batches: BatchService, activity: Activity, *, is_restarted: bool
    ) -> None:
        self._registry = registry
        self._batches = batches
        self._activity = activity
        self._epoch = secrets.token_hex(8)
        self._followers: dict[int, _FollowerState] = {}
        self._expected = worker.others
        self._expect_until = time.monotonic() + (_RESTARTED_S if is_restarted else 0)
        self._published: tuple[tuple[PublishedModel, ...], bool] = ((), False)
        self._version = 0
        self._changed = asyncio.Event()
        self._heard = asyncio.Event()

    async def watch(self) -> None:
        """Publish changes until cancelled."""
        while True:
            self._refresh()
            await asyncio.sleep(_POLL_S)

    def _refresh(self) -> None:
        current = self._registry.published(), self._batches.is_open
        if current != self._published or not self._version:
            self._published = current
            self._version += 1
            self._changed.set()
            self._changed = asyncio.Event()

    async def answer(self, receive: Receive, send: Send) -> None:
        """Answer the question of a follower."""
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
            message = await receive()
        # Only processes of this user can reach the socket, and they run the same program.
        report: Report = pickle.loads(body)  # noqa: S301 - see above
        follower = self._followers[report.worker] = _FollowerState()
        if report.epoch == self._epoch:
            follower.applied, follower.has_left = report.applied, report.has_left
        self._hear()
        self._registry.add_stats(report.stats)
        self._activity.add(report.seconds, report.failures)
        if follower.applied == self._version:
            gone = asyncio.create_task(_disconnect(receive))
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait({gone, changed}, timeout=report.wait_s, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if gone.done():
                follower.is_gone = True
                self._hear()
                return
            gone.cancel()
        follower.heard_at = time.monotonic()
        models, has_batches = self._published
        content = pickle.dumps(Published(self._epoch, self._version, models, has_batches))
        length = str(len(content)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": content})

    def _hear(self) -> None:
        self._heard.set()
        self._heard = asyncio.Event()

    async def wait_until_applied(self, *, unloaded: bool = False) -> None:
        """Wait until all followers serve the models as they are now; with `unloaded`, until they have unloaded the others."""
        self._refresh()
        version = self._version

        def is_waiting(index: int) -> bool:
            follower, now = self._followers.get(index), time.monotonic()
            if follower is None:
                return now < self._expect_until
            if follower.is_gone or now - follower.heard_at > _SILENT_S:
                return False
            return follower.applied < version or (unloaded and not follower.has_left)

        while any(map(is_waiting, self._expected)):
            heard = self._heard
            try:
                await asyncio.wait_for(heard.wait(), _WAIT_S)
            except TimeoutError:
                continue


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AppliedByAll:
    """Middleware of the primary that sends responses to requests that change models when all followers know the change."""

    def __init__(self, app: ASGIApp, primary: Primary) -> None:
        self._app = app
        self._primary = primary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] in _READ_ONLY
            or is_inference_request(scope["method"], scope["path"])
        ):
            await self._app(scope, receive, send)
            return

        async def send_when_applied(message: Message) -> None:
            if message["type"] == "http.response.start":
                await self._primary.wait_until_applied()
            await send(message)

        await self._app(scope, receive, send_when_applied)


class Follower:
    """The side of another worker. Used on the event loop."""

    def __init__(
        self, worker: Worker, registry: Registry, batches: BatchService, activity: Activity,
        on_following: Callable[[], None],
    ) -> None:  # fmt: skip
        """Create it; `on_following` is called when all models are loaded that the primary had at first."""
        self._worker = worker
        self._registry = registry
        self._batches = batches
        self._activity = activity
        self._on_following = on_following
        self._published: Published | None = None

    async def run(self) -> None:
        """Follow the primary until cancelled."""
        import httpx  # here and below, because a service with one worker does not need it

        transport = transport_to(self._worker, PRIMARY)
        async with httpx.AsyncClient(transport=transport, base_url=WORKER_URL, timeout=_TIMEOUT_S) as client:
            while True:
                try:
                    response = await client.post(SYNC_PATH, content=pickle.dumps(self._report()))
                    response.raise_for_status()
                except httpx.HTTPError as error:
                    logger.debug("worker %d does not answer, because it is being restarted: %r", PRIMARY, error)
                    await asyncio.sleep(_RETRY_S)
                    continue
                self._published = pickle.loads(response.content)  # noqa: S301 - from a socket of this user, as in Primary.answer
                await self._apply(self._published)

    def _report(self) -> Report:
        published = self._published
        seconds, failures = self._activity.take()
        has_left = self._registry.has_left
        return Report(
            worker=self._worker.index,
            epoch=published.epoch if published is not None else "",
            applied=published.version if published is not None else 0,
            has_left=has_left,
            wait_s=_WAIT_S if has_left and not self._registry.is_following else _LEAVING_WAIT_S,
            stats=self._registry.take_stats(),
            seconds=seconds,
            failures=failures,
        )

    async def _apply(self, published: Published) -> None:
        self._registry.follow(published.models)
        if published.has_batches and not self._batches.is_open:
            try:
                await self._batches.open()
            except ProviderError as error:
                logger.warning("this worker does not work on batches: %s", error)
        if not self._registry.is_following:
            self._on_following()


class OtherWorkers:
    """Asks the other workers for their metrics."""

    def __init__(self, worker: Worker) -> None:
        self._transports = [transport_to(worker, index) for index in worker.others]

    async def metrics(self) -> list[str]:
        """Return those metrics of each other worker that are read at each scrape, without workers that do not answer."""
        import httpx

        async def ask(transport: httpx.AsyncHTTPTransport) -> str:
            request = httpx.Request("GET", WORKER_URL + _METRICS_PATH)
            response = await transport.handle_async_request(request)
            try:
                return (await response.aread()).decode()
            finally:
                await response.aclose()

        asked = (asyncio.wait_for(ask(transport), _METRICS_TIMEOUT_S) for transport in self._transports)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, str)]


def transport_to(worker: Worker, index: int) -> httpx.AsyncHTTPTransport:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    return httpx.AsyncHTTPTransport(uds=str(socket_path(worker.directory, index)), limits=limits)
