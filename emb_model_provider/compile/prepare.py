"""From a snapshot to what serves it: an artifact, compiled here if need be, or the torch backend.

The serving process runs this. It imports no torch: choosing, looking up and waiting need none, and compiling
happens in a child process.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emb_model_provider.backends.cpu import native_bf16, usable_cpus
from emb_model_provider.backends.load import load_backend
from emb_model_provider.compile.accelerators import has_cuda
from emb_model_provider.compile.artifact import GRAPH, with_operators_prompts
from emb_model_provider.compile.child import ChildDiedError, run_child
from emb_model_provider.compile.job import Job
from emb_model_provider.compile.recipe import TOOL_PACKAGES, installed_version, precision_note, recipe_for
from emb_model_provider.compile.store import ArtifactStore
from emb_model_provider.errors import CacheNotWritableError, HubError, LoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.compile.artifact import Artifact
    from emb_model_provider.compile.recipe import Recipe
    from emb_model_provider.compile.store import Hold
    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.model_spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedBackend:
    """A backend that can be loaded now, within seconds."""

    load: Callable[[], Backend]
    """Call it once, on the thread that will own the backend. Raises: LoadError."""
    notes: tuple[str, ...] = ()
    """Why it is not the backend that was expected; also among the notes of the backend's description."""


class NoArtifactError(Exception):
    """There is no artifact to serve from, for the reason that the message gives."""


def prepare_backend(
    spec: ModelSpec,
    snapshot: Snapshot,
    *,
    trust_remote_code: bool,
    cache_dir: Path,
    max_cache_bytes: int,
    on_compiling: Callable[[], None],
    stopped: Callable[[], bool] = lambda: False,
) -> PreparedBackend:
    """Choose the backend of a model and make sure that what it serves from is there.

    Blocks, for seconds to minutes where the model is compiled: `on_compiling` is called before that. `stopped` is
    asked a few times a second; once it is true, compiling ends at once.

    Raises: LoadError where no backend can serve the model, or not the one that was asked for;
    CacheNotWritableError where `openvino` was asked for and cannot be compiled for that reason; InterruptedError
    when stopped.
    """
    if not _served_by_openvino(spec):
        return PreparedBackend(_torch(spec, snapshot, trust_remote_code, ()))
    try:
        artifact, hold = _artifact(
            spec, snapshot, trust_remote_code, ArtifactStore(cache_dir, max_bytes=max_cache_bytes), on_compiling, stopped
        )  # fmt: skip
    except (NoArtifactError, CacheNotWritableError) as error:
        if spec.backend == "openvino":
            if isinstance(error, CacheNotWritableError):
                raise
            raise LoadError(
                f"{snapshot.repository} cannot be served with EMB_PROVIDER_BACKEND=openvino: {error}. Set it to auto "
                "or torch."
            ) from error
        note = f"the torch backend serves it, since it could not be compiled for OpenVINO: {error}"
        logger.warning("model %s: %s", spec.alias, note)
        return PreparedBackend(_torch(spec, snapshot, trust_remote_code, (note,)), (note,))
    return PreparedBackend(_openvino(spec, artifact, hold))


def _served_by_openvino(spec: ModelSpec) -> bool:
    """Raises: LoadError where backend and device do not go together."""
    device = spec.device.strip().lower()
    if spec.backend == "torch":
        return False
    if device in ("auto", "cpu"):
        return device == "cpu" or spec.backend == "openvino" or not has_cuda()
    if spec.backend == "openvino":
        raise LoadError(
            f"EMB_PROVIDER_BACKEND=openvino serves on the CPU, not on EMB_PROVIDER_DEVICE={spec.device} "
            f"(model {spec.alias!r}). Set the device to cpu, or the backend to auto or torch."
        )
    return False


def _torch(
    spec: ModelSpec, snapshot: Snapshot, trust_remote_code: bool, notes: tuple[str, ...]
) -> Callable[[], Backend]:
    def load() -> Backend:
        try:
            backend = load_backend(
                replace(spec, backend="torch"), snapshot, trust_remote_code=trust_remote_code
            )
        except ImportError as error:
            raise LoadError(
                f"{' '.join((*notes, ''))}the torch backend cannot be imported here: {error}"
            ) from error
        backend.description = replace(backend.description, notes=(*backend.description.notes, *notes))
        return backend

    return load


def _openvino(spec: ModelSpec, artifact: Artifact, hold: Hold) -> Callable[[], Backend]:
    description = with_operators_prompts(artifact.description, spec.prompts)
    note = precision_note(spec.precision, description.precision)
    if note is not None:
        description = replace(description, notes=(*description.notes, note))

    def load() -> Backend:
        from emb_model_provider.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(artifact.directory / GRAPH, description, on_close=hold.release)

    return load


def _artifact(
    spec: ModelSpec,
    snapshot: Snapshot,
    trust_remote_code: bool,
    store: ArtifactStore,
    on_compiling: Callable[[], None],
    stopped: Callable[[], bool],
) -> tuple[Artifact, Hold]:
    """Find or make a model's artifact.

    Raises: NoArtifactError, CacheNotWritableError, LoadError, InterruptedError.
    """
    if installed_version("openvino") is None:
        raise NoArtifactError("OpenVINO is not installed (pip install openvino)")
    recipe = recipe_for(spec, snapshot, trust_remote_code=trust_remote_code, native_bf16=native_bf16())
    if (found := store.find(recipe)) is not None:
        logger.info("model %s: using the compiled artifact %s", spec.alias, recipe.key[:12])
        return found
    if (reason := store.refusal(recipe)) is not None:
        raise NoArtifactError(reason)
    obstacle = _obstacle(store)
    if obstacle is not None:
        if (found := store.find_compatible(recipe)) is None:
            raise obstacle
        name = found[0].directory.name[:12]
        logger.info("model %s: using the artifact %s, which was compiled elsewhere", spec.alias, name)
        return found
    on_compiling()
    try:
        with store.making(recipe, stopped=stopped) as directory:
            if (found := store.find(recipe)) is not None:  # another process has just made it
                return found
            if (reason := store.refusal(recipe)) is not None:
                raise NoArtifactError(reason)
            _compile(spec, snapshot, recipe, directory, store, stopped)
            return store.keep(recipe, directory)
    except CacheNotWritableError:
        raise
    except InterruptedError:
        raise
    except (HubError, OSError) as error:
        raise NoArtifactError(str(error)) from error


def _obstacle(store: ArtifactStore) -> NoArtifactError | CacheNotWritableError | None:
    """Return why nothing can be compiled here, or None."""
    missing = [name for name in TOOL_PACKAGES if installed_version(name) is None]
    if missing:
        return NoArtifactError(f"there is no artifact of it, and compiling needs {', '.join(missing)}")
    try:
        store.require_writable()
    except CacheNotWritableError as error:
        return error
    except HubError as error:
        return NoArtifactError(error.message)
    return None


def _compile(
    spec: ModelSpec,
    snapshot: Snapshot,
    recipe: Recipe,
    directory: Path,
    store: ArtifactStore,
    stopped: Callable[[], bool],
) -> None:
    """Let a child process fill `directory`.

    Raises: NoArtifactError; LoadError where no backend could load the snapshot; InterruptedError.
    """
    job = Job(
        spec=spec,
        snapshot=snapshot,
        recipe=recipe,
        directory=directory,
        threads=usable_cpus(),
        parent=os.getpid(),
    )
    try:
        result = run_child(job, stopped=stopped)
    except (ChildDiedError, OSError) as error:
        if isinstance(error, InterruptedError):
            raise
        # Not remembered: next time there may be more memory.
        raise NoArtifactError(str(error)) from error
    if result.outcome == "done":
        return
    if result.outcome == "broken":
        raise LoadError(result.reason)
    if result.outcome in ("refused", "unsupported"):
        store.refuse(recipe, result.reason)
    raise NoArtifactError(result.reason)
