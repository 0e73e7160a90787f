"""`python -m emb_model_provider.main`: the service, from settings to a clean end.

What a supervisor does not need is imported where it is used: it stays small for as long as the service runs.
"""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import socket
import sys
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from emb_model_provider.errors import SettingsError
from emb_model_provider.observability.logs import start_logging
from emb_model_provider.process.shutdown import ShutdownSignal, end_at_once, flush
from emb_model_provider.process.supervisor import (
    HUNG_EXIT,
    SHORTEST_SILENCE_S,
    InheritedState,
    Supervisor,
    take_inherited_state,
)
from emb_model_provider.settings.loading import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.observability.logs import LineWriter
    from emb_model_provider.settings import ServerSettings, Settings

logger = logging.getLogger("emb_model_provider.main")  # not __name__, which is __main__ here

_BACKLOG = 2048
"""Connections that may wait to be accepted, as far as the system allows that many."""


def main(*, supervise: bool = False) -> int:
    """Serve until told to stop; return the process's exit code.

    `supervise`: do so as a child of this process, whether EMB_PROVIDER_SUPERVISE says so or not.
    """
    inherited = take_inherited_state()
    try:
        settings, warnings = load_settings()
        supervise = inherited is None and _is_to_supervise(settings, supervise)
        sockets = listen(settings.server) if inherited is None else inherited.sockets
        logs = settings.logs
        # The file is the child's alone: of two processes that rotate one file, each loses lines of the other.
        writer = start_logging(logs.model_copy(update={"log_to_file": False}) if supervise else logs)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - there is no log yet
        return 1
    try:
        if supervise:
            return Supervisor(sockets, max(SHORTEST_SILENCE_S, settings.lifecycle.watchdog_s)).run()
        for warning in warnings:
            logger.warning("%s", warning)
        return _serve(settings, sockets, writer, inherited)
    finally:
        flush(writer)


def _is_to_supervise(settings: Settings, asked: bool) -> bool:
    """Raises: SettingsError where it is asked for but not possible."""
    wanted = asked or settings.lifecycle.supervise
    if wanted and os.name != "posix":
        raise SettingsError(
            "EMB_PROVIDER_SUPERVISE=true: this system cannot hand sockets to a child process."
        )
    return wanted


def _serve(
    settings: Settings, sockets: list[socket.socket], writer: LineWriter, inherited: InheritedState | None
) -> int:
    stop = ShutdownSignal(
        writer,
        settings.lifecycle.shutdown_grace_s,
        inherited.parent_pipe if inherited is not None else None,
    )
    # Of a crash in native code, which ends the process without another word, stderr gets the stacks.
    faulthandler.enable()
    if inherited is not None and inherited.after:
        logger.warning("started again by the supervisor: the service before %s", inherited.after)
    from emb_model_provider.process.server import serve

    if inherited is None:
        return serve(settings, sockets, stop)
    return serve(settings, sockets, stop, on_hung=partial(end_hung, stop, writer), beat=inherited.beat)


def end_hung(stop: ShutdownSignal, writer: LineWriter, reason: str) -> None:
    """End this process, so that the supervisor starts another: no thread can be ended from outside."""
    if stop.reason is None:  # else it is about to end anyway
        end_at_once(writer, HUNG_EXIT, f"{reason}: ending the process, so that the supervisor starts another")


def listen(server: ServerSettings) -> list[socket.socket]:
    """Open a listening socket for each address that the host means: `localhost` is often two.

    An address of several that this machine does not have is left out.

    Raises: SettingsError, in one line, where nothing can listen there: before a model is loaded.
    """
    where = f"EMB_PROVIDER_HOST={server.host}, EMB_PROVIDER_PORT={server.port}"
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SettingsError(f"{where}: the host is not known here ({error}).") from error
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        absent: OSError | None = None
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                sockets.append(opened.enter_context(_listening(family, address)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise SettingsError(
                        f"{where}: something else listens there: stop it, or set another port."
                    ) from error
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise SettingsError(f"{where}: cannot listen there ({error.strerror}).") from error
                absent = error
        if not sockets and absent is not None:
            raise SettingsError(f"{where}: cannot listen there ({absent.strerror}).") from absent
        opened.pop_all()
        return sockets


def _listening(family: int, address: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two processes have one port
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        one.listen(_BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def run(*, supervise: bool = False) -> NoReturn:
    """Serve, then end the process at once: a thread in the middle of a download, which nothing can interrupt, would
    hold up the interpreter's own end for as long as the download takes. The next start goes on with it.
    """
    code = main(supervise=supervise)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_USAGE = """\
Usage: python -m emb_model_provider.main

Serves embeddings, on http://localhost:9000 unless told otherwise. It takes no arguments: settings are environment
variables or lines of .env, such as EMB_PROVIDER_MODEL_NAME and EMB_PROVIDER_PORT; docs/configuration.md lists them.
Everything else is done by another command: emb-provider --help."""


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Raises: SystemExit where there are any: who writes `--port 8000` must not get another port without a word."""
    if not arguments:
        return
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)  # noqa: T201 - what was asked for
        raise SystemExit(0)
    print(  # noqa: T201 - there is no log yet
        f"error: {' '.join(arguments)}: the service takes no arguments. Set what you mean as an environment variable or in "
        ".env (EMB_PROVIDER_PORT=8000, say): docs/configuration.md lists all settings.",
        file=sys.stderr,
    )
    raise SystemExit(2)


if __name__ == "__main__":
    refuse_arguments(sys.argv[1:])
    run()
