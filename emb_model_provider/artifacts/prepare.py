"""From a snapshot to what serves it: an artifact, compiled here if need be, or the torch backend.

The serving process runs this. It imports no torch: choosing, looking up and waiting need none, and compiling
happens in a child process.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from emb_model_provider.artifacts.compile_job import Job
from emb_model_provider.artifacts.compiler_process import ChildDiedError, run_child
from emb_model_provider.artifacts.manifest import GRAPH, with_operators_prompts
from emb_model_provider.artifacts.recipe import TOOL_PACKAGES, installed_version, precision_note, recipe_for
from emb_model_provider.artifacts.store import ArtifactStore
from emb_model_provider.artifacts.torch_fidelity import MeasuredTorch
from emb_model_provider.backends.hardware import fast_int8, has_cuda, native_bf16, usable_cpus
from emb_model_provider.errors import CacheNotWritableError, HubError, LoadError
from emb_model_provider.fidelity.thresholds import UntrueModelError, require_true
from emb_model_provider.settings import FidelitySettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.artifacts.manifest import Artifact
    from emb_model_provider.artifacts.recipe import Recipe
    from emb_model_provider.artifacts.store import Hold
    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedBackend:
    """A backend that can be loaded now, within seconds."""

    load: Callable[[], Backend]
    """Call it once, on the thread that will own the backend. Raises: LoadError."""
    notes: tuple[str, ...] = ()
    """Why it is not the backend or the precision that was expected; also among the notes of its description."""
    backend: Literal["openvino", "torch"] = "torch"
    size: int = 0
    """Bytes on disk of what it is loaded from."""
    description: ModelDescription | None = None
    """Of an artifact; what torch serves is described once it is loaded."""


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
    fidelity: FidelitySettings | None = None,
) -> PreparedBackend:
    """Choose the backend of a model and make sure that what it serves from is there, and is true enough.

    Blocks, for seconds to minutes where the model is compiled: `on_compiling` is called before that. `stopped` is
    asked a few times a second; once it is true, compiling ends at once. What torch serves is measured when it is
    loaded, which then takes as long.

    Raises: LoadError where no backend can serve the model, or not the one that was asked for, or where it is below
    its floor; CacheNotWritableError where `openvino` was asked for and cannot be compiled for that reason;
    InterruptedError when stopped.
    """
    policy = fidelity or FidelitySettings()
    if not _served_by_openvino(spec):
        return _torch(MeasuredTorch(spec, snapshot, trust_remote_code, cache_dir, policy))
    store = ArtifactStore(cache_dir, max_bytes=max_cache_bytes)

    def find(spec: ModelSpec) -> tuple[Artifact, Hold]:
        return _artifact(spec, snapshot, trust_remote_code, store, on_compiling, stopped)

    try:
        return _openvino(spec, find, policy)
    except (NoArtifactError, CacheNotWritableError) as error:
        if spec.backend == "openvino":
            if isinstance(error, CacheNotWritableError):
                raise
            raise LoadError(
                f"{snapshot.repository} cannot be served with EMB_PROVIDER_BACKEND=openvino: {str(error).rstrip('.')}. "
                "Mend that, or set it to auto or torch."
            ) from error
        note = f"the torch backend serves it, since it could not be compiled for OpenVINO: {error}"
        logger.warning("model %s: %s", spec.alias, note)
        return _torch(MeasuredTorch(spec, snapshot, trust_remote_code, cache_dir, policy), (note,))


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


def _torch(model: MeasuredTorch, notes: tuple[str, ...] = ()) -> PreparedBackend:
    def load() -> Backend:
        try:
            backend = model.load()
        except ImportError as error:
            raise LoadError(
                f"{' '.join((*notes, ''))}the torch backend cannot be imported here: {error}"
            ) from error
        backend.description = replace(backend.description, notes=(*backend.description.notes, *notes))
        return backend

    size = sum(file.size for file in model.snapshot.files)
    return PreparedBackend(load, notes, "torch", size)


def _openvino(
    spec: ModelSpec, find: Callable[[ModelSpec], tuple[Artifact, Hold]], policy: FidelitySettings
) -> PreparedBackend:
    """Find or make an artifact that is true enough; where `auto`'s first is not, that of fp32.

    Raises: UntrueModelError; whatever `find` raises.
    """
    artifact, hold = find(spec)
    notes: tuple[str, ...] = ()
    try:
        _require_true(spec, artifact, policy)
    except UntrueModelError as error:
        hold.release()
        if spec.precision != "auto" or artifact.description.precision == "fp32":
            raise
        notes = (f"computed in fp32: {error.reason}",)
        logger.warning("model %s: %s", spec.alias, notes[0])
        spec = replace(spec, precision="fp32")
        artifact, hold = find(spec)
        try:
            _require_true(spec, artifact, policy)
        except UntrueModelError:
            hold.release()
            raise
    description = with_operators_prompts(artifact.description, spec.prompts)
    note = precision_note(spec.precision, description.compute or description.precision)
    notes = (*((note,) if note is not None else ()), *notes)
    description = replace(description, notes=(*description.notes, *notes))

    def load() -> Backend:
        from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend

        return OpenVinoBackend(artifact.directory / GRAPH, description, on_close=hold.release)

    return PreparedBackend(load, (), "openvino", artifact.size, description)


def _require_true(spec: ModelSpec, artifact: Artifact, policy: FidelitySettings) -> None:
    require_true(spec, artifact.description.precision, artifact.description.fidelity, policy.floors)


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
    recipe = recipe_for(
        spec,
        snapshot,
        trust_remote_code=trust_remote_code,
        native_bf16=native_bf16(),
        fast_int8=fast_int8(),
    )
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
