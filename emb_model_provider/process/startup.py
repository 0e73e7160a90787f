"""Starts the service. Models are loaded while the modules of the API are imported.

So this module must not import FastAPI or `process/server.py`, which does.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from uvicorn.loops.auto import auto_loop_factory

from emb_model_provider.api.model_parts import create_model_parts
from emb_model_provider.concurrency import run_in_daemon_thread
from emb_model_provider.serving.memory_tuning import limit_malloc_arenas

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import ModuleType

    from emb_model_provider.process.shutdown import ShutdownSignal
    from emb_model_provider.settings import Settings
    from emb_model_provider.workers import Worker

_GC_PAUSE_S = 10.0
"""How long the garbage collector is disabled at most, if no model is loaded sooner."""


def serve(
    settings: Settings,
    sockets: list[socket.socket],
    shutdown: ShutdownSignal,
    *,
    on_hung: Callable[[str], None] | None = None,
    beat: Callable[[], None] | None = None,
    worker: Worker | None = None,
    is_restarted: bool = False,
) -> int:
    """Serve on the main thread until the process is to shut down; return its exit code, 1 if no model could be loaded.

    `on_hung` is called with the reason if a model hangs permanently, and `beat` every `HEARTBEAT_EVERY_S` seconds on the
    event loop. `worker` is the one of several that this process is, and `is_restarted` whether it takes the place of another
    process.
    """
    limit_malloc_arenas()
    # OpenVINO imports its converter if it can, which only the compiler needs: 8 MB, and a twentieth of the time to start.
    sys.modules.setdefault("openvino.tools.ovc", None)  # type: ignore[arg-type]  # as the import system documents
    # Not `asyncio.run()`, because that waits for all threads at the end, even for one that is downloading.
    loop = auto_loop_factory()()
    loop.call_later(_GC_PAUSE_S, gc.enable)
    return loop.run_until_complete(
        _serve(settings, sockets, shutdown, on_hung=on_hung, beat=beat, worker=worker, is_restarted=is_restarted)
    )


async def _serve(
    settings: Settings, sockets: list[socket.socket], shutdown: ShutdownSignal, *, worker: Worker | None, **options: Any
) -> int:
    parts = None
    if worker is None:  # the loads of workers depend on each other
        parts = create_model_parts(settings)
        parts.begin_preloading()
    # On a thread, because the event loop takes the steps of loading. These are mostly native code, which runs beside Python.
    server = await run_in_daemon_thread("import-server", _import_server)
    code: int = await server.serve(settings, parts, sockets, shutdown, worker=worker, **options)
    return code


def _import_server() -> ModuleType:
    # FastAPI's models of an OpenAPI document are built when a client first asks for the document: this saves 60 ms. Those of
    # the API are not, because several threads could build one at the same time.
    BaseModel.model_config["defer_build"] = True
    try:
        import fastapi.openapi.models  # noqa: F401 - imported now, while the option is set
    finally:
        del BaseModel.model_config["defer_build"]
    from emb_model_provider.process import server

    return server
