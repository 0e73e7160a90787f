"""The torch backend, measured before it serves: compared with itself at fp32, on the same device.

Runs on the thread that will own the backend and imports torch there, not before. A figure is kept in the cache
directory, so that only the first start of a model at a precision takes the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.artifacts.manifest import read_fidelity
from emb_model_provider.artifacts.recipe import TOOL_PACKAGES, installed_version
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.precision import resolve_device, resolve_torch_precision
from emb_model_provider.backends.pytorch.import_guards import quiet_imports
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.fidelity.compare import MismatchError, compare, embed_texts, make_cases
from emb_model_provider.fidelity.texts import corpus_digest
from emb_model_provider.fidelity.thresholds import SETTING, AccuracyError, check_accuracy
from emb_model_provider.snapshots.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.backends.base import Backend, ComputePrecision, Fidelity
    from emb_model_provider.backends.precision import DeviceFacts
    from emb_model_provider.fidelity.compare import Case
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import FidelitySettings
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised by hand whenever a figure comes to mean something else, or the torch backend computes otherwise."""
_PACKAGES = ("tokenizers", *TOOL_PACKAGES, "torchao", "bitsandbytes")
_WEIGHTS = (".safetensors", ".bin")
_SPARE = 1.3
"""What loading and running take beside the weights."""


@dataclass(frozen=True, slots=True)
class TorchModel:
    """How to load one snapshot with torch at a precision that is true enough."""

    spec: ModelSpec
    snapshot: Snapshot
    trust_remote_code: bool
    cache_dir: Path
    policy: FidelitySettings

    def load(self) -> Backend:
        """Load the model, measured unless it is at fp32. Call it on the thread that will own the backend.

        Where `auto` finds a precision not true enough, it goes on to a truer one and notes why.

        Raises: LoadError; ImportError where torch is not installed.
        """
        from emb_model_provider.backends.pytorch.pipeline import torch_device_facts

        facts = torch_device_facts()
        device = resolve_device(self.spec.device, facts)
        first = resolve_torch_precision(self.spec.precision, device, facts)
        reference = _Reference(self)
        reasons: list[str] = []
        for precision in self._candidates(first, device):
            try:
                backend = self._load_true(precision, self._place(precision, device, facts), reference)
            except AccuracyError as error:
                if self.spec.precision != "auto":
                    raise
                reasons.append(error.reason)
                continue
            notes = tuple(f"computed in {precision}: {reason}" for reason in reasons)
            return _with(backend, notes=notes)
        raise AssertionError("fp32, the last of the candidates, is always true")

    def _candidates(self, first: ComputePrecision, device: str) -> tuple[ComputePrecision, ...]:
        if self.spec.precision != "auto" or first == "fp32":
            return (first,)
        # On a GPU fp16 is as quick as bf16 and keeps three more bits, but its range is narrower.
        return (first, "fp16", "fp32") if first == "bf16" and device.startswith("cuda") else (first, "fp32")

    def _load_true(self, precision: ComputePrecision, place: Path, reference: _Reference) -> Backend:
        """Load at one precision. Raises: UntrueModelError where it is not true enough, LoadError."""
        if precision == "fp32":
            return self.load_at(precision)
        if (known := _read(place)) is not None:
            self._require(precision, known)
            return _with(self.load_at(precision), fidelity=known)
        problem = "EMB_PROVIDER_MEASURE_FIDELITY=false"
        cases = None
        if self.policy.measure_fidelity:
            cases, problem = reference.cases(precision)
        backend = self.load_at(precision)
        if cases is None:
            note = f"how near its vectors at {precision} come to fp32 was not measured ({problem}), so {SETTING} was not checked"
            return _with(backend, notes=(note,))
        try:
            fidelity = compare(backend, cases, exact=False)
            _write(place, fidelity, self.snapshot)
            self._require(precision, fidelity)
        except MismatchError as error:
            backend.close()
            message = f"{self.spec.name} cannot be served at {precision}: {error}. Choose another precision, such as fp32."
            raise AccuracyError(message, reason=f"at {precision}, {error}") from error
        except BaseException:
            backend.close()
            raise
        return _with(backend, fidelity=fidelity)

    def load_at(self, precision: ComputePrecision) -> Backend:
        """Load at one precision, measured or not. Raises: LoadError, ImportError."""
        spec = replace(self.spec, backend="torch", precision=precision)
        with quiet_imports():
            from emb_model_provider.backends.pytorch.backend import TorchBackend
        return TorchBackend(spec, self.snapshot, trust_remote_code=self.trust_remote_code)

    def _require(self, precision: ComputePrecision, fidelity: Fidelity) -> None:
        check_accuracy(self.spec, precision, fidelity, self.policy.floors)

    def _place(self, precision: ComputePrecision, device: str, facts: DeviceFacts) -> Path:
        """Return the file of a figure, named for all that it depends on."""
        plan = plan_pipeline(
            replace(self.spec, prompts=None), self.snapshot, trust_remote_code=self.trust_remote_code
        )
        values = asdict(plan)
        del values["directory"]
        kind, _, number = device.partition(":")
        on = [kind, facts.cuda_capabilities[int(number or 0)] if kind == "cuda" else native_bf16()]
        key: dict[str, Any] = {
            "format": FORMAT,
            "snapshot": self.snapshot.digest,
            "plan": values,
            "trust_remote_code": self.trust_remote_code,
            "precision": precision,
            "device": on,
            "texts": corpus_digest(),
            "versions": {name: installed_version(name) for name in _PACKAGES},
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.cache_dir / "fidelity" / f"{name}.json"


class _Reference:
    """What the model gives at fp32, worked out once, when a precision is first measured."""

    def __init__(self, model: TorchModel) -> None:
        self._model = model
        self._found: tuple[Sequence[Case] | None, str] | None = None

    def cases(self, precision: ComputePrecision) -> tuple[Sequence[Case] | None, str]:
        """Return the cases, or None and why there are none: the model does not fit at fp32, most often."""
        if self._found is None:
            self._found = self._embed(precision)
        return self._found

    def _embed(self, precision: ComputePrecision) -> tuple[Sequence[Case] | None, str]:
        model = self._model
        needed, free = _bytes_at_fp32(model.snapshot), _free_memory()
        if free is not None and needed > free:
            return None, f"at fp32 it takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        logger.info(
            "model %s: measuring how near its vectors at %s come to fp32; it is done once and kept",
            model.spec.alias, precision,
        )  # fmt: skip
        try:
            backend = model.load_at("fp32")
            try:
                tokenization = Tokenization(backend.description)
                return make_cases(
                    lambda texts, prompt: embed_texts(backend, tokenization, texts, prompt),
                    backend.description,
                ), ""
            finally:
                backend.close()
        except ImportError:
            raise
        except Exception as error:
            # Not the end: whether the model can be served is found out by loading it as it is to be served.
            reason = " ".join(str(error).split())[:300]
            logger.warning("model %s: could not be run at fp32: %s", model.spec.alias, reason, exc_info=error)
            return None, f"it could not be run at fp32: {reason}"


def _with(backend: Backend, *, fidelity: Fidelity | None = None, notes: tuple[str, ...] = ()) -> Backend:
    description = backend.description
    backend.description = replace(
        description, fidelity=fidelity or description.fidelity, notes=(*description.notes, *notes)
    )
    return backend


def _read(place: Path) -> Fidelity | None:
    try:
        return read_fidelity(json.loads(place.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(place: Path, fidelity: Fidelity, snapshot: Snapshot) -> None:
    # The snapshot is named so that the figure can be removed with it.
    content = {**asdict(fidelity), "snapshot": snapshot.digest}
    # A cache that cannot be written costs the next start the time again, and nothing else.
    with contextlib.suppress(OSError):
        write_atomically(place, json.dumps(content, indent=1).encode())


def _bytes_at_fp32(snapshot: Snapshot) -> float:
    """Return about how much memory a model takes at fp32, from its files."""
    stored = sum(file.size for file in snapshot.files if file.path.endswith(_WEIGHTS))
    try:
        config = json.loads((snapshot.path / "config.json").read_bytes())
        halves = "16" in str(config.get("dtype") or config.get("torch_dtype"))
    except (OSError, ValueError, AttributeError):
        halves = False
    return stored * (2 if halves else 1) * _SPARE


def _free_memory() -> int | None:
    """Return how many bytes this process may still take, or None where the platform does not tell (not Linux).

    The fp32 copy is loaded through this memory whatever the device, and who runs out of it is killed without a word.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no limit
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    return free
