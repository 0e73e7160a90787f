"""Prepares the backend of a model: an artifact, compiled here if necessary, or the torch backend.

This imports no torch, because models are compiled in a child process.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.compiler_process import (
    CompileJob,
    CompilerDiedError,
    CompilerKilledError,
    CompileTimeoutError,
    run_compiler,
)
from emb_model_provider.artifacts.manifest import GRAPH, is_same_probe, probe, record_tuning
from emb_model_provider.artifacts.recipe import TOOL_PACKAGES, installed_version, precision_note, recipe_for
from emb_model_provider.artifacts.store import ArtifactStore
from emb_model_provider.artifacts.torch_fidelity import TorchModel, has_memory_for_both
from emb_model_provider.artifacts.torch_process import TorchProcess
from emb_model_provider.backends.base import Tuning
from emb_model_provider.backends.hardware import (
    cuda_problem,
    fast_int8,
    free_memory,
    has_cuda,
    native_bf16,
    usable_cpus,
)
from emb_model_provider.backends.memory_estimate import declared_bytes
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.repository import Repository
from emb_model_provider.backends.routes import RoutedBackend, combine_kinds, describe_routes, routes_of
from emb_model_provider.errors import CacheNotWritableError, HubError, LoadError
from emb_model_provider.fidelity.cases import Runner, make_cases
from emb_model_provider.fidelity.compare import MIN_COSINE, AccuracyError, check_accuracy, compare
from emb_model_provider.formatting import format_size
from emb_model_provider.progress import CancelToken, OnProgress, OnWork, Progress, ignore_progress, measure_work
from emb_model_provider.snapshots.files import CACHE_SETTING, translate_os_error
from emb_model_provider.snapshots.weights import find_export

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from emb_model_provider.artifacts.manifest import Artifact
    from emb_model_provider.artifacts.recipe import Recipe
    from emb_model_provider.backends.base import Backend, BackendKind, Fidelity, ModelDescription
    from emb_model_provider.backends.openvino_cpu.tuning import Trial
    from emb_model_provider.backends.routes import Routes
    from emb_model_provider.model_spec import ModelSpec, Precision
    from emb_model_provider.settings import FidelitySettings, HubSettings, TrustSettings
    from emb_model_provider.snapshots.locks import FileLock
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)

_TURN_POLL_S = 0.2
_BACKEND = "`--backend`, or EMB_PROVIDER_BACKEND"
_DEVICE = "`--device`, or EMB_PROVIDER_DEVICE"
_TIMEOUT_SETTING = "EMB_PROVIDER_COMPILE_TIMEOUT_S"
_COMPILING_BYTES = 8.0
"""Memory that compiling takes at least for each weight: at fp32 in torch, and again in the graph."""
_ITEM_BYTES: Mapping[Precision, float] = {"fp32": 4.0, "int8": 1.0, "int4": 0.5}
"""Memory that torch takes at least for each weight; at any other precision, 2 bytes."""
_LOAD_STEP = "load"
"""The step in which the compiler loads a model as torch would do in this process."""
_CHOOSE_ANOTHER = "Choose another model, or look for an unusual value in its configuration files."
_MEMORY_ADVICE = (
    "Free memory, raise the memory limit of the container, or choose a smaller model (torch: or a lower "
    "precision: `--precision`, or EMB_PROVIDER_MODEL_PRECISION)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileLimits:
    """How long compiling may be without progress, in seconds. COMPILE_TIMEOUT_S limits its whole time."""

    step_s: float = 600.0
    step_s_per_gib: float = 600.0
    """A step may take this much longer for each GiB of the model."""
    wait_s: float = 3600.0
    """A model waits for another one to be compiled only as long as that one, or the next one, makes progress within this
    time; and for another process that compiles the same model, only this long."""


@dataclass(frozen=True, slots=True)
class PreparedBackend:
    """A backend that can be loaded within seconds."""

    load: Callable[[], Backend]
    """Loads it; raises LoadError. Call it once, on the thread that will own the backend."""
    notes: tuple[str, ...] = ()
    """Why it is not the expected backend or precision. They are also among the notes of its description."""
    backend: BackendKind = "torch"
    size: int = 0
    """Bytes on disk."""
    description: ModelDescription | None = None
    """Description of an artifact. A torch backend is described when it is loaded."""


class NoArtifactError(Exception):
    """There is no artifact to serve; the message says why."""


class BackendPreparer:
    """Turns snapshots into backends that are ready to load. Thread-safe; compiles one model at a time."""

    def __init__(
        self,
        hubs: HubSettings,
        fidelity: FidelitySettings,
        trust: TrustSettings,
        limits: CompileLimits = CompileLimits(),
        on_work: OnWork = lambda _: None,
    ) -> None:
        self._cache_dir = hubs.cache_dir
        self._compile_timeout_s = hubs.compile_timeout_s
        self._tune_s = hubs.tune_s
        self._fidelity = fidelity
        self._trust = trust
        self._store = ArtifactStore(hubs.cache_dir, max_bytes=hubs.max_artifact_bytes)
        self._limits = limits
        self._on_work = on_work
        # Held while compiling, because compiling takes all processors.
        self._turn = threading.Lock()
        self._progressed_at = time.monotonic()
        """When a compilation last made progress."""

    def prepare(
        self,
        spec: ModelSpec,
        snapshot: Snapshot,
        *,
        on_progress: OnProgress = ignore_progress,
        cancel: CancelToken | None = None,
    ) -> PreparedBackend:
        """Choose the backend of a model, and make sure that it can be loaded and is accurate enough.

        Blocks, for seconds to minutes if the model is compiled. The torch backend is compared with fp32 when it is
        loaded, which then takes as long.

        Raises:
            LoadError: No backend can serve the model, or not the requested one, or its accuracy is below the floor.
            CacheNotWritableError: `openvino` was requested, and the cache for its artifact cannot be written.
            OperationCancelledError: `cancel` was cancelled.
        """
        routes = routes_of(Repository.of(snapshot)) if spec.route is None else None
        if routes is not None:
            return self._prepare_routes(routes, spec, snapshot, on_progress, cancel)
        notes: tuple[str, ...] = ()
        if Repository.of(snapshot, spec.route).is_static:
            if spec.precision in ("int8", "int4"):
                notes = (
                    f"precision {spec.precision}: static embeddings have no matrices to quantize, so fp32 is used",
                )
                spec = replace(spec, precision="fp32")
            if (prepared := self._prepare_static(spec, snapshot, notes)) is not None:
                return prepared
        export = find_export([file.path for file in snapshot.files])
        if export is not None:
            spec = _for_export(spec, snapshot, export)
        elif not _uses_openvino(spec):
            return self._prepare_torch(spec, snapshot, notes)
        elif spec.backend == "auto" and spec.device.strip().lower() == "auto" and (problem := cuda_problem()):
            note = f"served on the CPU, because {problem}"
            logger.warning("model %s: %s", spec.alias, note)
            notes = (*notes, note)
        try:
            return self._prepare_openvino(spec, snapshot, on_progress, cancel or CancelToken(), notes)
        except (NoArtifactError, CacheNotWritableError) as error:
            if export is not None and isinstance(error, NoArtifactError):
                raise LoadError(
                    f"{snapshot.repository} has no weights, only {export}, and cannot be served from it: {error}"
                ) from error
            if spec.backend != "openvino":
                note = f"served by the torch backend, because it could not be compiled for OpenVINO: {error}"
                logger.warning("model %s: %s", spec.alias, note)
                return self._prepare_torch(spec, snapshot, (*notes, note))
            if isinstance(error, CacheNotWritableError):
                raise
            raise LoadError(
                f"{snapshot.repository} cannot be served with the backend openvino: {str(error).rstrip('.')}. Fix this, or set "
                f"it to auto or torch: {_BACKEND}."
            ) from error

    def tune(
        self,
        spec: ModelSpec,
        snapshot: Snapshot,
        *,
        within_s: float,
        on_progress: OnProgress = ignore_progress,
        on_trial: Callable[[Trial], object] = lambda _: None,
        cancel: CancelToken | None = None,
    ) -> Tuning:
        """Choose the options of OpenVINO for a model again, and record them with its artifact. Blocks.

        The model is compiled first if necessary. Services that have loaded it use the options when they load it again.

        Args:
            spec: The model.
            snapshot: Its files.
            within_s: Approximate limit of the time for measurements, in seconds.
            on_progress: Called with the progress of compiling.
            on_trial: Called with each option that was measured.
            cancel: Ends the compiler.

        Raises:
            LoadError: OpenVINO does not serve the model, or it has other outputs than dense vectors, whose difference to
                fp32 cannot be bounded without the original model.
            CacheNotWritableError: The options cannot be recorded.
            OperationCancelledError: `cancel` was cancelled.
        """
        from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
        from emb_model_provider.backends.openvino_cpu.tuning import measure_int8_gain, tune

        name = snapshot.repository
        if not _uses_openvino(spec) or routes_of(Repository.of(snapshot)) is not None:
            raise LoadError(f"{name} is not served by one graph of OpenVINO, so there is nothing to tune")
        try:
            artifact, lock, _ = self._accurate_artifact(spec, snapshot, on_progress, cancel or CancelToken())
        except NoArtifactError as error:
            raise LoadError(f"{name} is not served by OpenVINO, so there is nothing to tune: {error}") from error
        description = artifact.description
        if description.outputs != ("dense",):
            lock.release()
            raise LoadError(f"{name} has other outputs than dense vectors, and can be tuned only while it is compiled")
        with lock:
            on_progress(Progress("tune", name))
            graph = artifact.directory / GRAPH
            tuning = tune(graph, description, within_s=within_s, on_trial=on_trial)
            default = OpenVinoBackend(graph, replace(description, tuning=Tuning()))
            tuned = OpenVinoBackend(graph, replace(description, tuning=tuning))
            try:
                difference = compare(tuned, make_cases(Runner(default), description), exact=False)
            finally:
                default.close()
                tuned.close()
            if not self._is_accurate(description, difference):
                tuning = Tuning()
            if description.compute == "int8":
                gain = measure_int8_gain(graph, replace(description, tuning=tuning), within_s=within_s / 4)
                tuning = replace(tuning, int8_gain=gain)
            try:
                record_tuning(artifact.directory, tuning)
            except OSError as error:
                raise translate_os_error(error, artifact.directory, CACHE_SETTING) or error from error
        return tuning

    def _is_accurate(self, description: ModelDescription, difference: Fidelity) -> bool:
        """Return whether a model stays above its floor if its vectors differ this much from those that were measured.

        The angle to the reference is at most the sum of the angles to the measured vector and between that and the
        reference.
        """
        measured = description.fidelity
        values = [1.0 if measured is None else measured.min_cosine, difference.min_cosine]
        floor = self._fidelity.floors[description.precision]
        if description.compute is None:
            floor = max(floor, MIN_COSINE)
        angles = [math.acos(min(1.0, value)) for value in values if value is not None]
        return math.cos(sum(angles)) >= floor

    def is_compiled_later(self, spec: ModelSpec, snapshot: Snapshot) -> bool:
        """Return whether `prepare` would compile a model, and torch computes equal vectors on the CPU until then.

        Not so for integer weights, whose vectors differ from those of torch. There must be enough memory for both.
        """
        if spec.backend != "auto" or spec.precision in ("int8", "int4") or not _uses_openvino(spec):
            return False
        if find_export([file.path for file in snapshot.files]) is not None or not has_memory_for_both(snapshot):
            return False
        try:
            self._require_memory(spec, snapshot, 4)
            routes = routes_of(Repository.of(snapshot))
            names = dict.fromkeys(routes.by_task.values()) if routes is not None else (None,)
            specs = [replace(spec, route=name) for name in names]
            recipes = [
                self._recipe(each, snapshot) for each in specs if not Repository.of(snapshot, each.route).is_static
            ]
            missing = [recipe for recipe in recipes if not self._store.has(recipe)]
            refused = [each for each in missing if self._store.refusal(each, timeout_s=self._compile_timeout_s)]
            if not missing or refused or installed_version("openvino") is None:
                return False
            self._check_can_compile()
        except (LoadError, NoArtifactError, CacheNotWritableError):  # `prepare` raises it again, or serves with torch
            return False
        return True

    def load_interim(self, spec: ModelSpec, snapshot: Snapshot, cancel: CancelToken) -> Backend:
        """Load a model for which `is_compiled_later` is true, on the thread that will own the backend; see TorchProcess."""
        return TorchProcess(spec, snapshot, trust_remote_code=self.allows_code(spec, snapshot), cancel=cancel)

    def allows_code(self, spec: ModelSpec, snapshot: Snapshot) -> bool:
        """Return whether code from the repository of a model may run."""
        return self._trust.allows(spec, snapshot.hub)

    def _prepare_routes(
        self, routes: Routes, spec: ModelSpec, snapshot: Snapshot, on_progress: OnProgress, cancel: CancelToken | None
    ) -> PreparedBackend:
        """Prepare each route of an asymmetric model as a model of its own."""
        prepared = {
            name: self.prepare(replace(spec, route=name), snapshot, on_progress=on_progress, cancel=cancel)
            for name in dict.fromkeys(routes.by_task.values())
        }
        descriptions = {name: each.description for name, each in prepared.items() if each.description is not None}
        return PreparedBackend(
            lambda: RoutedBackend.load({name: each.load for name, each in prepared.items()}, routes),
            notes=tuple(f"{name}: {note}" for name, each in prepared.items() for note in each.notes),
            backend=combine_kinds(each.backend for each in prepared.values()),
            size=sum(each.size for each in prepared.values()),
            description=describe_routes(descriptions, routes) if len(descriptions) == len(prepared) else None,
        )

    def _prepare_static(self, spec: ModelSpec, snapshot: Snapshot, notes: tuple[str, ...]) -> PreparedBackend | None:
        """Prepare static embeddings without torch; return None if it must load them, as requested or for their modules."""
        if spec.backend != "auto" or spec.device.strip().lower() not in ("auto", "cpu"):
            return None
        from emb_model_provider.backends.static import table_file  # numpy takes long to import

        trust = self.allows_code(spec, snapshot)
        plan = plan_pipeline(spec, snapshot, trust_remote_code=trust)
        table = table_file(Repository.of(snapshot, spec.route), plan)
        if table is None:
            return None
        if spec.precision in ("bf16", "fp16"):
            notes = (f"precision {spec.precision}: static embeddings are added up in fp32, which takes no longer",)
        model = TorchModel(spec, snapshot, trust, self._cache_dir, self._fidelity)

        def load() -> Backend:
            backend = model.load_static(plan, table)
            backend.description = replace(backend.description, notes=(*backend.description.notes, *notes))
            return backend

        return PreparedBackend(load, notes, "numpy", table.stat().st_size)

    def _prepare_torch(self, spec: ModelSpec, snapshot: Snapshot, notes: tuple[str, ...] = ()) -> PreparedBackend:
        model = TorchModel(spec, snapshot, self.allows_code(spec, snapshot), self._cache_dir, self._fidelity)

        def load() -> Backend:
            # Only now, because other models may have been unloaded for this one.
            self._require_memory(spec, snapshot)
            try:
                backend = model.load()
            except ImportError as error:
                reason = " ".join((*notes, "the torch backend cannot be imported here"))
                raise LoadError(f"{reason}: {error}") from error
            backend.description = replace(backend.description, notes=(*backend.description.notes, *notes))
            return backend

        return PreparedBackend(load, notes, "torch", snapshot.size)

    def _prepare_openvino(
        self, spec: ModelSpec, snapshot: Snapshot, on_progress: OnProgress, cancel: CancelToken, notes: tuple[str, ...]
    ) -> PreparedBackend:
        """Find or make an artifact that is accurate enough; if that of `auto` or `bf16` is not, one at fp32."""
        artifact, lock, found = self._accurate_artifact(spec, snapshot, on_progress, cancel)
        notes = (*notes, *found)
        description = artifact.description
        computed = description.compute or description.precision
        gain = description.tuning.int8_gain
        if (note := precision_note(spec.precision, computed, native_bf16=native_bf16(), int8_gain=gain)) is not None:
            notes = (note, *notes)
        description = replace(
            description, prompts={**description.prompts, **(spec.prompts or {})}, notes=(*description.notes, *notes)
        )

        def load() -> Backend:
            if (backend := self._load(artifact, description, lock)) is not None:
                return backend
            logger.error("model %s: its artifact is damaged: compiling it again", spec.alias)
            return self.prepare(spec, snapshot, cancel=cancel).load()

        return PreparedBackend(load, backend="openvino", size=artifact.size, description=description)

    def _accurate_artifact(
        self, spec: ModelSpec, snapshot: Snapshot, on_progress: OnProgress, cancel: CancelToken
    ) -> tuple[Artifact, FileLock, tuple[str, ...]]:
        """Find or make an artifact that is accurate enough, and return it with its lock and notes."""
        notes: tuple[str, ...] = ()
        while True:
            artifact, lock = self._artifact(spec, snapshot, on_progress, cancel)
            description = artifact.description
            try:
                check_accuracy(
                    spec,
                    description.precision,
                    description.fidelity,
                    self._fidelity.floors,
                    self._fidelity.lowest_agreement,
                    name=snapshot.repository,
                )
            except AccuracyError as error:
                lock.release()
                if spec.precision not in ("auto", "bf16") or description.precision == "fp32":
                    raise
                notes = (*notes, f"computed in fp32: {error.reason}")
                logger.warning("model %s: %s", spec.alias, notes[-1])
                spec = replace(spec, precision="fp32")
            else:
                return artifact, lock, notes

    def _load(self, artifact: Artifact, description: ModelDescription, lock: FileLock) -> Backend | None:
        """Load an artifact, and compare the vector of the fixed input with the recorded one.

        Return None if the artifact is damaged: its files were changed, although their sizes and time stamps were not.
        LoadError if it cannot be loaded although its files are as they were written.
        """
        from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend

        key = artifact.directory.name
        try:
            backend = OpenVinoBackend(artifact.directory / GRAPH, description, on_close=lock.release)
        except LoadError:
            lock.release()
            if self._store.verify(key):
                raise
            return None
        try:
            # If the files are unchanged, another processor made the artifact.
            if is_same_probe(probe(backend), artifact.probe) or self._store.verify(key):
                return backend
        except BaseException:
            backend.close()
            raise
        backend.close()
        return None

    def _artifact(
        self, spec: ModelSpec, snapshot: Snapshot, on_progress: OnProgress, cancel: CancelToken
    ) -> tuple[Artifact, FileLock]:
        """Find or make the artifact of a model, and the lock that keeps it on disk."""
        if Repository.of(snapshot, spec.route).is_static:
            raise NoArtifactError("static embeddings are only looked up and averaged, so there is nothing to compile")
        if installed_version("openvino") is None:
            raise NoArtifactError("OpenVINO is not installed (pip install openvino)")
        recipe = self._recipe(spec, snapshot)
        if (found := self._find(recipe)) is not None:
            logger.debug("model %s: using the artifact %s", spec.alias, recipe.key[:12])
            return found
        try:
            self._check_can_compile()
        except (NoArtifactError, CacheNotWritableError):
            if (found := self._store.find_compatible(recipe)) is None:
                raise
            name = found[0].directory.name[:12]
            logger.info("model %s: using the artifact %s, compiled on another machine", spec.alias, name)
            return found
        on_progress(Progress("compile", snapshot.repository))
        since = time.monotonic()
        while not self._turn.acquire(timeout=_TURN_POLL_S):
            cancel.raise_if_cancelled()
            if time.monotonic() - max(since, self._progressed_at) > self._limits.wait_s:
                raise NoArtifactError(
                    f"another model is being compiled, without progress for {self._limits.wait_s:g} s. Restart the service"
                )

        def report(progress: Progress) -> None:
            self._progressed_at = time.monotonic()
            on_progress(progress)

        try:
            self._progressed_at = time.monotonic()
            with measure_work("compile", spec.alias, report, self._on_work) as measured:
                return self._compile(spec, snapshot, recipe, measured, cancel)
        finally:
            self._turn.release()

    def _recipe(self, spec: ModelSpec, snapshot: Snapshot) -> Recipe:
        return recipe_for(
            spec,
            snapshot,
            trust_remote_code=self.allows_code(spec, snapshot),
            native_bf16=native_bf16(),
            fast_int8=fast_int8(),
        )

    def _require_memory(self, spec: ModelSpec, snapshot: Snapshot, item_bytes: float | None = None) -> None:
        """Raise LoadError if the weights that a model declares do not fit into the free memory."""
        item_bytes = item_bytes or _ITEM_BYTES.get(spec.precision, 2.0)
        needed, free = declared_bytes(Repository.of(snapshot, spec.route), item_bytes), free_memory()
        if needed > free:
            raise LoadError(
                f"{snapshot.repository} needs at least {format_size(needed)} of memory by its config.json, and "
                f"{format_size(free)} are free. {_MEMORY_ADVICE}"
            )

    def _find(self, recipe: Recipe) -> tuple[Artifact, FileLock] | None:
        """Return the artifact of a recipe; None if it must be compiled; NoArtifactError if it was refused before."""
        found = self._store.find(recipe)
        if found is None:
            reason = self._store.refusal(recipe, timeout_s=self._compile_timeout_s)
            if reason is not None:
                raise NoArtifactError(reason)
        return found

    def _check_can_compile(self) -> None:
        missing = [name for name in TOOL_PACKAGES if installed_version(name) is None]
        if missing:
            raise NoArtifactError(f"it has no artifact, and compiling needs {', '.join(missing)}")
        try:
            self._store.require_writable()
        except CacheNotWritableError:
            raise
        except HubError as error:
            raise NoArtifactError(error.message) from error

    def _compile(
        self, spec: ModelSpec, snapshot: Snapshot, recipe: Recipe, on_progress: OnProgress, cancel: CancelToken
    ) -> tuple[Artifact, FileLock]:
        name, limits = snapshot.repository, self._limits
        try:
            self._require_memory(spec, snapshot, _COMPILING_BYTES)
        except LoadError as error:
            raise NoArtifactError(f"compiling it needs too much memory: {error.message}") from error
        try:
            with self._store.making(recipe, cancel, wait_s=limits.wait_s) as directory:
                if (found := self._find(recipe)) is not None:  # another process has just made it
                    return found
                job = CompileJob(
                    spec=spec,
                    snapshot=snapshot,
                    recipe=recipe,
                    directory=directory,
                    threads=usable_cpus(),
                    tune_s=self._tune_s,
                )
                try:
                    result = run_compiler(
                        job,
                        on_progress,
                        cancel,
                        timeout_s=self._compile_timeout_s,
                        step_timeout_s=limits.step_s + limits.step_s_per_gib * snapshot.size / 2**30,
                    )
                except CompileTimeoutError as error:
                    if error.step == _LOAD_STEP:
                        # torch would hang in this process, and everything with it.
                        raise LoadError(f"{name} cannot be loaded: {error}. {_CHOOSE_ANOTHER}") from error
                    reason = f"{error}. To allow more time, increase {_TIMEOUT_SETTING} (0: no limit)"
                    self._store.refuse(recipe, reason, timeout_s=self._compile_timeout_s)
                    raise NoArtifactError(reason) from error
                except CompilerKilledError as error:
                    raise LoadError(_out_of_memory(name, str(error))) from error
                if result.outcome == "done":
                    return self._store.add(recipe, directory)
                if result.outcome == "broken":
                    raise LoadError(result.reason)
                if result.outcome == "no memory":
                    raise LoadError(_out_of_memory(name, result.reason))
                if result.outcome in ("refused", "unsupported"):
                    self._store.refuse(recipe, result.reason)
                raise NoArtifactError(result.reason)
        except CacheNotWritableError:
            raise
        except (CompilerDiedError, HubError, OSError) as error:  # TimeoutError included
            # Not recorded, because the next attempt may have more memory or space.
            raise NoArtifactError(str(error)) from error


def _out_of_memory(name: str, reason: str) -> str:
    # torch is not tried in this process, because it would take as much memory, and the system would kill all models.
    return (
        f"{name} could not be compiled: {reason}. It is not loaded by torch instead, because that could end the service. "
        f"{_MEMORY_ADVICE} To load it without compiling, set the backend to torch: {_BACKEND}."
    )


def _for_export(spec: ModelSpec, snapshot: Snapshot, export: str) -> ModelSpec:
    """Return the spec of a model that has only an export, which OpenVINO runs; LoadError if it must not run there."""
    if spec.backend == "torch" or spec.device.strip().lower() not in ("auto", "cpu"):
        raise LoadError(
            f"{snapshot.repository} has no weights for torch, only {export}, which OpenVINO runs on the CPU. Set the backend to "
            f"auto or openvino ({_BACKEND}) and the device to auto or cpu ({_DEVICE}), or choose a repository that has "
            "weights."
        )
    return replace(spec, backend="openvino", device="cpu")


def _uses_openvino(spec: ModelSpec) -> bool:
    """Return whether OpenVINO is to serve a model; LoadError if it was requested for another device than the CPU."""
    device = spec.device.strip().lower()
    if spec.backend == "torch":
        return False
    if device in ("auto", "cpu"):
        return device == "cpu" or spec.backend == "openvino" or not has_cuda()
    if spec.backend == "openvino":
        raise LoadError(
            f"The backend openvino serves on the CPU, not on the device {spec.device} (model {spec.alias!r}). Set the device "
            f"to cpu ({_DEVICE}), or the backend to auto or torch ({_BACKEND})."
        )
    return False
