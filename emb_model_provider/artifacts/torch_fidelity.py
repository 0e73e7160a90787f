"""Loads a model with the torch backend, and compares it with itself at fp32 on the same device before it is served.

The measured fidelity is kept in the cache directory, so that only the first load of a model at a precision takes the
time. torch is imported only when a model is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from emb_model_provider.artifacts.manifest import read_fidelity
from emb_model_provider.artifacts.recipe import TOOL_PACKAGES, installed_version, plan_values
from emb_model_provider.backends.hardware import free_memory, native_bf16
from emb_model_provider.backends.precision import (
    DeviceFacts,
    accurate_precisions,
    resolve_device,
    resolve_torch_precision,
)
from emb_model_provider.backends.repository import Repository
from emb_model_provider.fidelity.cases import Runner, make_cases
from emb_model_provider.fidelity.compare import (
    SETTING,
    AccuracyError,
    MismatchError,
    check_accuracy,
    compare,
    measure_reference,
)
from emb_model_provider.fidelity.texts import corpus_digest
from emb_model_provider.formatting import first_line, format_size
from emb_model_provider.snapshots.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.backends.base import Backend, ComputePrecision, Fidelity
    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.fidelity.cases import Case
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import FidelitySettings
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)

FORMAT = 4
"""Increased by hand whenever a measured value changes its meaning, or the torch backend computes differently."""
_PACKAGES = ("tokenizers", *TOOL_PACKAGES, "torchao", "bitsandbytes")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_MEMORY_FACTOR = 1.3
"""Memory for loading and running a model, relative to its weights."""
_COPIES_FOR_BOTH = 4
"""Of the weights: one in the process that serves, the others in the compiler."""
_RUNTIMES_BYTES = 2 * 10**9
"""Memory that two processes with torch take beside the weights."""


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A model to load with torch at a precision that is accurate enough."""

    spec: ModelSpec
    snapshot: Snapshot
    trust_remote_code: bool
    cache_dir: Path
    fidelity: FidelitySettings

    def load(self) -> Backend:
        """Load the model and, below fp32, measure its fidelity. Call it on the thread that will own the backend.

        If the precision is not accurate enough, `auto` tries more accurate ones, with a note; so does bf16 for a model
        that was to be compiled, which would be computed in fp32, too.

        Raises:
            LoadError: The model cannot be loaded; an AccuracyError if the requested precision is not accurate enough.
            ImportError: torch is not installed.
        """
        from emb_model_provider.backends.pytorch.pipeline import torch_device_facts

        facts = torch_device_facts()
        device = resolve_device(self.spec.device, facts)
        stored_bf16 = Repository.of(self.snapshot, self.spec.route).stores_bf16
        chosen = resolve_torch_precision(self.spec.precision, device, facts, stored_bf16=stored_bf16)
        reference = _Reference(self, device)
        reasons: list[str] = []
        candidates = self._candidates(chosen, device, facts)
        for precision in candidates:
            try:
                backend = self._load_if_accurate(precision, self._record_path(precision, device, facts), reference)
            except AccuracyError as error:
                if precision == candidates[-1]:
                    raise
                reasons.append(error.reason)
                continue
            notes = tuple(f"computed in {precision}: {reason}" for reason in reasons)
            if precision == "fp32" and reasons and device.startswith("cuda"):
                logger.warning(
                    "model %s runs at fp32, which takes about ten times as long on a GPU: %s",
                    self.spec.alias, "; ".join(reasons),
                )  # fmt: skip
            return _annotate(backend, notes=notes)
        raise AssertionError("fp32, the last candidate, is always accurate")

    def load_static(self, plan: PipelinePlan, table: Path) -> Backend:
        """Load static embeddings without torch, with the vectors that torch would compute at fp32; LoadError if they are damaged."""
        from emb_model_provider.backends.static import StaticBackend

        backend = StaticBackend(Repository.of(self.snapshot, self.spec.route), plan, table)
        return self._calibrated(backend, self._record_path("fp32", "cpu", DeviceFacts()))

    def load_at(self, precision: ComputePrecision) -> Backend:
        from emb_model_provider.backends.pytorch.backend import TorchBackend

        spec = replace(self.spec, backend="torch", precision=precision)
        return TorchBackend(spec, self.snapshot, trust_remote_code=self.trust_remote_code)

    def _candidates(self, chosen: ComputePrecision, device: str, facts: DeviceFacts) -> tuple[ComputePrecision, ...]:
        if self.spec.precision == "bf16" and self.spec.backend != "torch" and device == "cpu":
            return ("bf16", "fp32")
        return accurate_precisions(chosen, device, facts) if self.spec.precision == "auto" else (chosen,)

    def _load_if_accurate(self, precision: ComputePrecision, record: Path, reference: _Reference) -> Backend:
        if precision == "fp32":
            return self._calibrated(self.load_at(precision), record)
        if (known := _read_record(record)) is not None:
            self._check(precision, known)
            return _annotate(self.load_at(precision), fidelity=known)
        cases: list[Case] | str = "EMB_PROVIDER_MEASURE_FIDELITY=false"
        if self.fidelity.measure_fidelity:
            cases = reference.cases(precision)
        backend = self.load_at(precision)
        if isinstance(cases, str):
            note = f"its fidelity at {precision} was not measured ({cases}), so {SETTING} was not checked"
            return _annotate(backend, notes=(note,))
        try:
            fidelity = compare(backend, cases, exact=False)
            _write_record(record, fidelity, self.snapshot)
            self._check(precision, fidelity)
        except MismatchError as error:
            backend.close()
            raise AccuracyError(
                f"{self.snapshot.repository} cannot be served at {precision}: {error}. Choose another precision, such as fp32.",
                reason=f"at {precision}, {error}",
            ) from error
        except BaseException:
            backend.close()
            raise
        return _annotate(backend, fidelity=fidelity)

    def _check(self, precision: ComputePrecision, fidelity: Fidelity) -> None:
        floors, name = self.fidelity, self.snapshot.repository
        check_accuracy(self.spec, precision, fidelity, floors.floors, floors.lowest_agreement, name=name)

    def _calibrated(self, backend: Backend, record: Path) -> Backend:
        """Add the calibration of a model at fp32, which is measured at its first load and kept."""
        if "dense" not in backend.description.outputs:
            return backend
        known = _read_record(record)
        if known is None and self.fidelity.measure_fidelity:
            logger.info(
                "model %s: measuring the ranges of its vectors; this is done once, and the result is kept",
                self.spec.alias,
            )
            try:
                known = measure_reference(backend)
            except Exception as error:
                # Not fatal, because only vectors of integers need the ranges.
                logger.warning("model %s: the ranges of its vectors were not measured", self.spec.alias, exc_info=error)
                return backend
            _write_record(record, known, self.snapshot)
        if known is not None:
            backend.description = replace(backend.description, own_calibration=known.calibration)
        return backend

    def _record_path(self, precision: ComputePrecision, device: str, facts: DeviceFacts) -> Path:
        """Return the file of a measured fidelity. Its name is a digest of everything the value depends on."""
        kind, _, number = device.partition(":")
        on = [kind, facts.cuda_capabilities[int(number or 0)] if kind == "cuda" else native_bf16()]
        key: dict[str, Any] = {
            "format": FORMAT,
            "snapshot": self.snapshot.digest,
            "plan": plan_values(self.spec, self.snapshot, trust_remote_code=self.trust_remote_code),
            "trust_remote_code": self.trust_remote_code,
            "precision": precision,
            "device": on,
            "texts": corpus_digest(),
            "versions": {name: installed_version(name) for name in _PACKAGES},
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.cache_dir / "fidelity" / f"{name}.json"


class _Reference:
    """The reference vectors of a model at fp32, computed once, when a precision is first measured."""

    def __init__(self, model: TorchModel, device: str) -> None:
        self._model = model
        self._device = device
        self._cases: list[Case] | str | None = None

    def cases(self, precision: ComputePrecision) -> list[Case] | str:
        """Return the cases or why there are none; most often, the model does not fit into memory at fp32."""
        if self._cases is None:
            self._cases = self._embed(precision)
        return self._cases

    def _embed(self, precision: ComputePrecision) -> list[Case] | str:
        model = self._model
        needed, free = bytes_at_fp32(model.snapshot), free_memory()
        if needed > free:
            return f"at fp32 it needs about {format_size(needed)}, and {format_size(free)} are free"
        if self._device.startswith("cuda"):
            from emb_model_provider.backends.pytorch.pipeline import free_device_memory

            if needed > (free := free_device_memory(self._device)):
                return (
                    f"at fp32 it needs about {format_size(needed)}, and {format_size(free)} are free on {self._device}"
                )
        logger.info(
            "model %s: measuring its fidelity at %s; this is done once, and the result is kept",
            model.spec.alias, precision,
        )  # fmt: skip
        try:
            with contextlib.closing(model.load_at("fp32")) as backend:
                return make_cases(Runner(backend), backend.description)
        except ImportError:
            raise
        except Exception as error:
            # Not fatal, because the model may load at the precision that is to be served.
            reason = first_line(error)
            logger.warning("model %s: it cannot run at fp32: %s", model.spec.alias, reason, exc_info=error)
            return f"it cannot run at fp32: {reason}"


def bytes_at_fp32(snapshot: Snapshot) -> float:
    """Estimate the memory in bytes that a model needs at fp32, from the size of its files."""
    stored = sum(file.size for file in snapshot.files if file.path.endswith(_WEIGHT_SUFFIXES))
    try:
        config = json.loads((snapshot.path / "config.json").read_bytes())
        halves = "16" in str(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):
        halves = False
    return stored * (2 if halves else 1) * _MEMORY_FACTOR


def has_memory_for_both(snapshot: Snapshot) -> bool:
    """Return whether a model can be compiled while torch runs it in another process."""
    return _COPIES_FOR_BOTH * bytes_at_fp32(snapshot) + _RUNTIMES_BYTES < free_memory()


def _annotate(backend: Backend, *, fidelity: Fidelity | None = None, notes: tuple[str, ...] = ()) -> Backend:
    description = backend.description
    backend.description = replace(
        description, fidelity=fidelity or description.fidelity, notes=(*description.notes, *notes)
    )
    return backend


def _read_record(path: Path) -> Fidelity | None:
    try:
        return read_fidelity(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(path: Path, fidelity: Fidelity, snapshot: Snapshot) -> None:
    # The digest of the snapshot is included so that the record can be removed with the snapshot.
    content = {**asdict(fidelity), "snapshot": snapshot.digest}
    # If the cache is not writable, the next load measures again.
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(content, indent=1).encode())
