"""The program `python -m emb_model_provider.main`: reads the settings, opens the sockets, and serves or supervises.

Modules that a supervisor does not need are imported inside functions, so that its process stays small.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import logging
import os
import socket
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from emb_model_provider.errors import SettingsError
from emb_model_provider.observability.logs import start_logging
from emb_model_provider.process.shutdown import ShutdownSignal, end_at_once, flush
from emb_model_provider.process.supervisor import (
    HUNG_EXIT,
    InheritedState,
    Supervisor,
    SupervisorTimings,
    take_inherited_state,
)
from emb_model_provider.settings.hosts import ANY
from emb_model_provider.settings.loading import load_settings, overridden_names
from emb_model_provider.workers import WorkerGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.observability.logs import LineWriter
    from emb_model_provider.settings import LifecycleSettings, ServerSettings, Settings

logger = logging.getLogger("emb_model_provider.main")  # not __name__, which is __main__ here

_ALL_IPV4 = "0.0.0.0"  # noqa: S104 - compared, not the default
_BACKLOG = 4096
"""Connections that may wait to be accepted. The system may allow fewer."""
_USAGE = """\
Usage: python -m emb_model_provider.main

Serves embeddings, by default on http://localhost:9000. It takes no arguments. Set environment variables or lines of
.env instead, such as EMB_PROVIDER_MODEL_NAME and EMB_PROVIDER_PORT; docs/configuration.md lists them.
For other commands see emb-provider --help."""


def run(*, supervise: bool = False) -> NoReturn:
    """Run `main`, then end the process at once.

    The interpreter would wait for all threads, even for one that is downloading and cannot be interrupted.
    """
    code = main(supervise=supervise)
    with suppress(OSError):  # the disk that they are written to is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main(*, supervise: bool = False) -> int:
    """Serve until the process is shut down, and return its exit code.

    With `supervise` it serves in a child process, even if EMB_PROVIDER_SUPERVISE is false.
    """
    inherited = take_inherited_state()
    try:
        settings, warnings = load_settings()
        settings.batch_jobs.require_driver()
        supervise = inherited is None and _should_supervise(settings.lifecycle, supervise)
        sockets = listen(settings.server) if inherited is None else inherited.sockets
        group = _create_group(settings) if supervise else None
        logs = settings.logs
        # Only the child writes the log file, because two processes that rotate one file lose lines.
        writer = start_logging(
            logs.model_copy(update={"log_to_file": False}) if supervise else logs,
            worker=inherited.worker.index if inherited is not None and inherited.worker is not None else 0,
        )
    except SettingsError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)  # noqa: T201 - there is no log yet
        return 1
    try:
        if supervise:
            heartbeat_timeout_s = max(SupervisorTimings().heartbeat_timeout_s, settings.lifecycle.watchdog_s)
            timings = SupervisorTimings(heartbeat_timeout_s=heartbeat_timeout_s)
            if group is None:
                return Supervisor(sockets, timings).run()
            try:
                return Supervisor(sockets, timings, group).run()
            finally:
                group.remove()
        if inherited is not None and inherited.worker is not None and not inherited.worker.is_primary:
            return _serve(settings, sockets, writer, inherited)  # worker 0 logs the warnings
        for warning in warnings:
            logger.warning("%s", warning)
        if names := overridden_names():  # an image sets some, which its user does not see
            logger.info("%s: the value in .env is not used, because the environment has another one", ", ".join(names))
        return _serve(settings, sockets, writer, inherited)
    finally:
        flush(writer)


def listen(server: ServerSettings) -> list[socket.socket]:
    """Open a listening socket for each address of the hosts that this machine has. `localhost` often has two."""
    setting = f"EMB_PROVIDER_HOST={server.host}, EMB_PROVIDER_PORT={server.port}"
    with ExitStack() as opened:
        sockets: dict[tuple[socket.AddressFamily, str], socket.socket] = {}
        # 0.0.0.0 first, because it includes the other IPv4 addresses, which then need no sockets of their own.
        for host in sorted(server.hosts, key=lambda host: host != _ALL_IPV4):
            missing: OSError | None = None
            listens = False
            for family, address in _resolve(host, server.port, setting):
                if (family, address[0]) in sockets or (family is socket.AF_INET and (family, _ALL_IPV4) in sockets):
                    listens = True
                    continue
                try:
                    listening = socket.create_server(address, family=family, backlog=_BACKLOG)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise SettingsError(
                            f"{setting}: another process listens on this port. Stop it, or choose another port: `emb-provider serve --port`, or "
                            "EMB_PROVIDER_PORT."
                        ) from error
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise SettingsError(f"{setting}: cannot listen on {host}: {error.strerror}.") from error
                    missing = error
                else:
                    sockets[family, address[0]] = opened.enter_context(listening)
                    listens = True
            if not listens and missing is not None:
                raise SettingsError(f"{setting}: cannot listen on {host}: {missing.strerror}.") from missing
        opened.pop_all()
        return list(sockets.values())


def _resolve(host: str, port: int, setting: str) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        addresses = socket.getaddrinfo(
            None if host == ANY else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{setting}: the host {host} cannot be resolved ({error}).") from error
    return [(family, address) for family, _, _, _, address in addresses]


def reject_arguments(arguments: Sequence[str]) -> None:
    """Exit if there are arguments, because ignoring `--port 8000` would serve on another port."""
    if {"-h", "--help"} & set(arguments):
        print(_USAGE)  # noqa: T201 - the output of the command
        raise SystemExit(0)
    if arguments:
        print(  # noqa: T201 - there is no log yet
            f"error: {' '.join(arguments)}: the service takes no arguments. Set an environment variable or a line of "
            ".env instead, such as EMB_PROVIDER_PORT=8000. docs/configuration.md lists all settings.",
            file=sys.stderr,
        )
        raise SystemExit(2)


def _should_supervise(lifecycle: LifecycleSettings, requested: bool) -> bool:
    supervise = requested or lifecycle.supervise or lifecycle.workers > 1
    if supervise and os.name != "posix":
        setting = f"WORKERS={lifecycle.workers}" if lifecycle.workers > 1 else "SUPERVISE=true"
        raise SettingsError(
            f"EMB_PROVIDER_{setting} is not supported on this system, because it cannot pass sockets to a child "
            f"process. Set it to {'1' if lifecycle.workers > 1 else 'false'}."
        )
    return supervise


def _create_group(settings: Settings) -> WorkerGroup | None:
    """Create what several workers share, or return None for one worker."""
    count = settings.lifecycle.workers
    if count == 1:
        return None
    from emb_model_provider.backends.hardware import usable_cpus
    from emb_model_provider.snapshots.files import use_temporary_directory

    use_temporary_directory(settings.hubs.cache_dir)
    return WorkerGroup.create(count, cpus=usable_cpus(), quotas=len(settings.server.key_names))


def _serve(
    settings: Settings, sockets: list[socket.socket], writer: LineWriter, inherited: InheritedState | None
) -> int:
    shutdown = ShutdownSignal(
        writer, settings.lifecycle.shutdown_grace_s, inherited.parent_pipe if inherited is not None else None
    )
    # Prints the stacks of all threads to stderr if native code crashes.
    faulthandler.enable()
    if inherited is not None and inherited.previous_end:
        logger.warning("restarted by the supervisor: the previous process %s", inherited.previous_end)
    gc.disable()  # until a model is loaded (`freeze_gc`), because hardly anything that is imported is garbage
    from emb_model_provider.process.startup import serve

    if inherited is None:
        return serve(settings, sockets, shutdown)

    def on_hung(reason: str) -> None:
        # A thread that hangs can only be ended with its process.
        if shutdown.reason is None:
            end_at_once(writer, HUNG_EXIT, f"{reason}, exiting for a restart by the supervisor")

    return serve(
        settings, sockets, shutdown, on_hung=on_hung, beat=inherited.beat,
        worker=inherited.worker, is_restarted=bool(inherited.previous_end),
    )  # fmt: skip


if __name__ == "__main__":
    reject_arguments(sys.argv[1:])
    run()
