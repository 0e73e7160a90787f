"""What the clients of the hubs lack: retries of short requests, bounds on waiting, certificates for both, and advice."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from emb_model_provider.concurrency import start_thread
from emb_model_provider.errors import HubUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_PROXY_VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_CA_FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables with a file of certificates: that of OpenSSL and Hugging Face's client, and those of ModelScope's."""
_DROPPED = {"ReadError", "WriteError", "RemoteProtocolError", "ReadTimeout", "ConnectionResetError"}
"""Errors of connections that were established, by their class in any HTTP library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a request to a hub may take, and when it is repeated, in seconds."""

    pauses_s: tuple[float, ...] = (0.5, 1.5, 4.0)
    """Pauses before the repetitions of a request that failed temporarily."""
    max_pause_s: float = 60.0
    """A hub that asks for a longer pause is not asked again."""
    warn_s: float = 20.0
    """A hub that has not answered for this long is reported."""
    answer_s: float = 300.0
    """A hub that has not answered for this long has failed: its client may be waiting because the hub asked it to."""


def share_certificates() -> None:
    """Let both clients use the file of certificates that is meant for one of them, by the variable of either."""
    file = next((os.environ[name] for name in _CA_FILES if os.environ.get(name)), None)
    if file is not None and os.path.isfile(file):  # noqa: PTH113 - a directory is for one client only
        for name in _CA_FILES[:2]:
            os.environ.setdefault(name, file)


def ask(
    hub: str,
    work: Callable[[], T],
    check: Callable[[], None],
    pause_after: Callable[[BaseException], float | None],
    patience: Patience | None = None,
) -> T:
    """Send a short request to a hub, again if it fails temporarily, and return its result.

    Args:
        hub: Name of the hub, for messages.
        work: Sends the request. It goes on in the background if the hub does not answer in time.
        check: Called often while the hub has not answered; may raise an error to end the wait.
        pause_after: Returns how long the hub asks to wait after an error (0: it does not say), or None if the request
            would fail again.
        patience: How long to wait.

    Raises:
        HubUnavailableError: The hub did not answer.
    """
    times = patience or Patience()
    return repeat(hub, lambda: _wait_for_answer(hub, work, check, times), check, pause_after, times)


def repeat(
    hub: str,
    work: Callable[[], T],
    check: Callable[[], None],
    pause_after: Callable[[BaseException], float | None],
    patience: Patience | None = None,
) -> T:
    """Do the work, again if it fails temporarily; see `ask`. It can take any time."""
    times = patience or Patience()
    for pause_s in times.pauses_s:
        try:
            return work()
        except Exception as error:  # the clients raise errors of several libraries
            asked_s = pause_after(error)
            if asked_s is None or asked_s > times.max_pause_s:
                raise
            pause_s = max(pause_s, asked_s)
            logger.warning("%s failed (%s), it is asked again in %g s", hub, type(error).__name__, pause_s)
        end = time.monotonic() + pause_s
        while (left_s := end - time.monotonic()) > 0:
            check()
            time.sleep(min(_POLL_S, left_s))
    return work()


def is_dropped(error: BaseException) -> bool:
    """Return whether a connection broke after it had been established, so that another one can succeed."""
    return not _DROPPED.isdisjoint(cls.__name__ for cls in type(error).__mro__)


def advice_about(error: BaseException) -> str:
    """Return what to do about a hub that cannot be reached: about a certificate or a proxy, or an empty string."""
    texts = [str(each) for each in _causes(error)]
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in _causes(error)) or any(
        "CERTIFICATE_VERIFY_FAILED" in text for text in texts
    ):
        return (
            "Its certificate is signed by an authority that is not known here, such as that of a company's proxy: set "
            "SSL_CERT_FILE to a file with the certificate of this authority."
        )
    used = [name for name in _PROXY_VARIABLES for name in (name, name.lower()) if os.environ.get(name)]
    # Not every client says in its error that the proxy is what refused the connection.
    if used or any("proxy" in text.lower() or "SOCKS" in text for text in texts):
        return (
            f"Check the proxy in {', '.join(used) or 'the settings of the system'}, and the network. Its URL begins with "
            "http://, https:// or socks5://; NO_PROXY excludes hosts from it."
        )
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and everything that it was raised from or contains."""
    seen: set[int] = set()
    remaining: list[BaseException | None] = [error]
    while remaining:
        each = remaining.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        remaining += [each.__cause__, each.__context__, *(arg for arg in each.args if isinstance(arg, BaseException))]


def _wait_for_answer(hub: str, work: Callable[[], T], check: Callable[[], None], times: Patience) -> T:
    done: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is passed to the caller
            done.set_exception(error)
        else:
            done.set_result(result)

    done.set_running_or_notify_cancel()
    start_thread(threading.Thread(target=run, name="ask-hub", daemon=True))
    started, is_reported = time.monotonic(), False
    while not done.done():
        check()
        waited_s = time.monotonic() - started
        if waited_s >= times.warn_s and not is_reported:
            is_reported = True
            logger.warning("%s has not answered for %.0f s; waiting for at most %.0f s", hub, waited_s, times.answer_s)
        if waited_s >= times.answer_s:
            raise HubUnavailableError(
                f"{hub} has not answered for {waited_s:.0f} s. It may limit the requests of this address (HTTP 429), or a "
                "proxy drops them. Try again later, or set the endpoint to a mirror."
            )
        try:
            return done.result(_POLL_S)
        except TimeoutError:
            if done.done():
                raise
    return done.result()
