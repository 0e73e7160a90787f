"""The torch backend: runs batches of tokens through a pipeline of sentence-transformers, on CPU, CUDA or MPS."""

from __future__ import annotations

import copy
import gc
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from emb_model_provider.backends.arrays import OutputBuilder, pad_inputs
from emb_model_provider.backends.base import INPUT_IDS, POOLING_MASK, SENTENCE_EMBEDDING, check_ids, check_lengths
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.backends.memory_estimate import activation_bytes, device_batch_tokens, torch_bytes
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.precision import resolve_activations, resolve_device, resolve_torch_precision
from emb_model_provider.backends.pytorch.description import describe
from emb_model_provider.backends.pytorch.heads import run_pipeline, serve_pipeline
from emb_model_provider.backends.pytorch.norms import fuse_norms
from emb_model_provider.backends.pytorch.packing import (
    PROBES,
    Packing,
    disagreement,
    packable,
    to_device,
    varlen_available,
    varlen_kernel,
)
from emb_model_provider.backends.pytorch.padding import NOTE as PADDING_NOTE
from emb_model_provider.backends.pytorch.padding import depends_on_padding
from emb_model_provider.backends.pytorch.pipeline import (
    explain_error,
    free_device_memory,
    load_pipeline,
    torch_device_facts,
)
from emb_model_provider.backends.pytorch.quantization import PACKAGES, import_packages, quantize_pipeline
from emb_model_provider.backends.repository import Repository, reading_files
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.base import Outputs, TokenBatch
    from emb_model_provider.backends.pytorch.packing import Kernel
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.snapshots.snapshot import Snapshot


_FP32_COPY_S = 300.0
"""How long a copy of the weights at fp32 is kept after its last use."""
_COUNTED_TOKENS = 8_192
"""Tokens of a batch whose memory counts as that of a model on a GPU. That of larger ones is shared by all models."""
_CHANGING_POSITIONS = ("dynamic", "longrope")
"""Types of rotary positions whose tables change with the length of a batch, so that one batch can run at a time."""


class TorchBackend:
    """A pipeline loaded with PyTorch. One thread creates and closes it."""

    def __init__(self, spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> None:
        """Load a snapshot, and run one token through it.

        Raises:
            LoadError: It cannot be loaded; for example a DeviceUnavailableError, UnsupportedPrecisionError or
                UnsupportedModelError.
        """
        name = snapshot.repository
        facts = torch_device_facts()
        device = resolve_device(spec.device, facts)
        repository = Repository.of(snapshot, spec.route)
        with reading_files(name):
            stored_bf16 = repository.stores_bf16
        precision = resolve_torch_precision(spec.precision, device, facts, stored_bf16=stored_bf16)
        compute = resolve_activations(precision, device, facts, native_bf16=native_bf16())
        import_packages(precision)  # before anything is read, because it fails most often
        plan = plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)
        quantized = precision in PACKAGES
        # Quantizing moves the layers to the device one by one, so that a GPU never holds the model at full size.
        pipeline, plan = load_pipeline(
            plan,
            snapshot,
            precision=compute,
            device="cpu" if quantized else device,
            trust_remote_code=trust_remote_code,
        )
        served = serve_pipeline(pipeline, plan, repository)
        notes: tuple[str, ...] = ()
        if quantized:
            try:
                notes = quantize_pipeline(served.pipeline, precision=precision, device=device)
            except LoadError:
                raise
            except Exception as error:
                raise explain_error(error, name) from error
        description = describe(pipeline, served, plan, name, precision=precision, device=device, backend="torch")
        pipeline = served.pipeline
        on_cuda = device.startswith("cuda")
        if on_cuda and compute != "fp32":
            # Sums of products at fp32 cost nothing measurable, and fp16 needs them.
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            fuse_norms(pipeline)
        self._pads = not depends_on_padding(pipeline, description)
        if not self._pads:
            notes = (*notes, PADDING_NOTE)
        self.description = replace(description, notes=(*description.notes, *notes))
        self._table_rows = description.vocab_size
        if isinstance(pipeline[0], StaticEmbedding):
            _add_zero_row(pipeline[0])
            self._table_rows += 1
            self.description = replace(self.description, packs=True)
        self._pipeline: BaseModel | None = pipeline
        self._device = torch.device(device)
        self._packing: Packing | None = None
        self._local = threading.local()
        """The CUDA stream of each thread that runs batches."""
        self._threads = count()
        self._fp32 = _Fp32Copy()
        if compute != "fp32" and varlen_available(self._device):
            self.pack(varlen_kernel)
        # On a CPU a batch uses all cores, so that two at a time would not be faster. On a GPU the work of the host for one
        # batch, such as forming it and starting its kernels, is done while the kernels of the other one run.
        self.streams = 2 if on_cuda and not quantized and _has_fixed_positions(pipeline) else 1
        held = sum(map(_tensor_bytes, (*pipeline.parameters(), *pipeline.buffers())))
        if on_cuda:
            try:
                self._warm_up()
            except Exception as error:
                raise explain_error(error, name) from error
            per_token = activation_bytes(repository, 4 if compute == "fp32" else 2)
            tokens = device_batch_tokens(free_device_memory(self._device), per_token, self.streams)
            self.description = replace(self.description, max_batch_tokens=tokens)
            working = per_token * min(tokens, _COUNTED_TOKENS)
            self.memory_bytes = torch_bytes(held, self.description, working)
        else:
            self.memory_bytes = torch_bytes(held, self.description)

    def run(self, batch: TokenBatch) -> Outputs:
        self._fp32.expire()
        return self._run(batch, self._open_pipeline(), self._packing)

    def _run(self, batch: TokenBatch, pipeline: BaseModel, packing: Packing | None) -> Outputs:
        check_lengths(batch, self.description.max_length)
        builder = OutputBuilder(batch, self.description)
        # Pooling of sentence-transformers supports only one prompt length per batch.
        prompts = batch.prompt_lengths if self.description.excludes_prompt else [0] * len(batch.ids)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (ids, prompt_length) in enumerate(zip(batch.ids, prompts, strict=True)):
            groups.setdefault((prompt_length, 0 if self._pads else len(ids)), []).append(row)
        for (prompt_length, _), rows in groups.items():
            builder.add(rows, self._forward(pipeline, packing, batch, rows, prompt_length=prompt_length))
        return builder.build()

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        """Compute at fp32 with a copy of the weights, which is kept for some minutes, because inputs that need it recur.

        Raises:
            NotImplementedError: The weights are integers.
        """
        pipeline, precision = self._open_pipeline(), self.description.precision
        if precision in PACKAGES:
            raise NotImplementedError(f"weights at {precision} are not computed at fp32")
        if precision == "fp32":
            return self.run(batch)
        return self._run(batch, self._fp32.of(pipeline, self._packing), None)

    @property
    def packs(self) -> bool:
        """Whether batches are packed: their inputs are concatenated instead of padded."""
        return self._packing is not None

    def pack(self, kernel: Kernel) -> None:
        """Pack batches from now on, with `kernel` for attention, if packing does not change the vectors of this model.

        If it does, batches are padded as before, and a note in the description says so.
        """
        pipeline = self._pipeline
        if pipeline is None or not packable(pipeline):
            return
        batch = Tokenization(self.description).encode(PROBES, truncate="END").batch()
        padded = self._vectors(batch)
        alone = np.concatenate([self._vectors(batch.select([row])) for row in range(len(PROBES))])
        packing = Packing(pipeline, kernel)
        self._packing = packing
        try:
            reason = disagreement(self._vectors(batch), padded, alone)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, batches are padded
            reason = describe_error(error)
        if reason is None:
            self.description = replace(self.description, packs=True)
            return
        self.unpack()
        note = f"inputs are padded, because packing changes the vectors of this model here ({reason})"
        self.description = replace(self.description, notes=(*self.description.notes, note))

    def unpack(self) -> None:
        """Pad batches from now on."""
        if self._packing is not None:
            self._packing.undo(self._open_pipeline())
            self._packing = None
            self.description = replace(self.description, packs=False)

    def close(self) -> None:
        self._pipeline = self._packing = None
        self._fp32.drop()
        # Objects that the engine has excluded from collection after it loaded the model; see `freeze_gc`.
        gc.unfreeze()
        _free_memory(self._device)

    def _open_pipeline(self) -> BaseModel:
        if self._pipeline is None:
            raise RuntimeError("the backend is closed")
        return self._pipeline

    def _warm_up(self) -> None:
        """Run short and long batches, because CUDA loads each kernel when it is first used."""
        encoded = Tokenization(self.description).encode(PROBES, truncate="END").batch()
        # A tokenizer can have more ids than the model.
        rows = [row for row, ids in enumerate(encoded.ids) if max(ids) < self.description.vocab_size]
        for repeats in (1, 8):
            if rows:
                self.run(encoded.select(rows[:1] if repeats == 1 else rows * repeats))
        torch.cuda.synchronize(self._device)

    def _vectors(self, batch: TokenBatch) -> NDArray[np.float32]:
        rows = range(len(batch.ids))
        return self._forward(self._open_pipeline(), self._packing, batch, rows)[SENTENCE_EMBEDDING]

    def _on_stream(self) -> AbstractContextManager[object]:
        """Return a context in which the kernels of this thread do not wait for those of others."""
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._local, "stream"):
            self._local.stream = _cuda_stream(self._device, next(self._threads) % 2)
            # Weights may still be being written on the stream of the thread that loads them.
            torch.cuda.synchronize(self._device)
        return torch.cuda.stream(self._local.stream)

    @torch.inference_mode()
    def _forward(
        self,
        pipeline: BaseModel,
        packing: Packing | None,
        batch: TokenBatch,
        rows: Sequence[int],
        *,
        prompt_length: int = 0,
    ) -> dict[str, NDArray[np.float32]]:
        """Return the arrays of the pipeline for some inputs of a batch."""
        try:
            with self._on_stream():
                features = self._features(pipeline, packing, batch, rows)
                if prompt_length:
                    features["prompt_length"] = prompt_length
                arrays = run_pipeline(pipeline, features, self.description.arrays)
                return _to_host({name: array.float() for name, array in arrays.items()}, self._device)
        except torch.OutOfMemoryError:
            # The memory that PyTorch keeps may be too fragmented for the next attempt.
            torch.cuda.empty_cache()
            raise

    def _features(
        self, pipeline: BaseModel, packing: Packing | None, batch: TokenBatch, rows: Sequence[int]
    ) -> dict[str, Any]:
        is_static = isinstance(pipeline[0], StaticEmbedding)
        if packing is not None or is_static:
            lengths = [len(batch.ids[row]) for row in rows]
            ids = np.fromiter(chain.from_iterable(batch.ids[row] for row in rows), dtype=np.int64, count=sum(lengths))
            check_ids(ids, self._table_rows)
            if packing is not None:
                return packing.features(ids, lengths, self._device)
            tokens, offsets = to_device((ids, np.cumsum([0, *lengths[:-1]])), self._device)
            return {INPUT_IDS: tokens, "offsets": offsets}
        arrays = pad_inputs(batch, rows, max(len(batch.ids[row]) for row in rows), self.description)
        arrays.pop(POOLING_MASK, None)  # `prompt_length` in its place
        # Checked first, because on CUDA the lookup of a missing row breaks the CUDA context of the whole process.
        check_ids(arrays[INPUT_IDS], self._table_rows)
        if self._device.type != "cuda":
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        copied = to_device(tuple(arrays.values()), self._device)
        return {name: each.view(arrays[name].shape).long() for name, each in zip(arrays, copied, strict=True)}


class _Fp32Copy:
    """A copy of a pipeline at fp32, which is made when it is needed, and kept for some minutes. Thread-safe."""

    def __init__(self) -> None:
        self._pipeline: BaseModel | None = None
        self._used_at = 0.0
        self._lock = threading.Lock()

    def of(self, pipeline: BaseModel, packing: Packing | None) -> BaseModel:
        """Return the copy of a pipeline. It reads padded batches."""
        with self._lock:
            if self._pipeline is None:
                # The tokenizer is shared, because copying it takes seconds, and the pipeline does not change it.
                first: Any = pipeline[0]
                shared = (getattr(first, "processor", None), getattr(first, "tokenizer", None))
                made = copy.deepcopy(pipeline, {id(each): each for each in shared if each is not None}).float()
                if packing is not None:
                    packing.undo(made)
                if made.device.type == "cuda":
                    torch.cuda.synchronize(made.device)  # the threads that use it have streams of their own
                self._pipeline = made
            self._used_at = time.monotonic()
            return self._pipeline

    def expire(self) -> None:
        """Free the copy if it was not used for some minutes."""
        pipeline = self._pipeline  # another thread may drop it
        if pipeline is not None and time.monotonic() - self._used_at > _FP32_COPY_S:
            device = pipeline.device
            del pipeline
            self.drop()
            _free_memory(device)

    def drop(self) -> None:
        self._pipeline = None


@cache
def _cuda_stream(device: torch.device, number: int) -> torch.cuda.Stream:  # noqa: ARG001 - part of the key of the cache
    """Return one of the streams of a device. All models share them, because each has memory that is never freed."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _free_memory(device: torch.device) -> None:
    """Free the memory of a pipeline that is no longer used."""
    # The modules of a pipeline refer to each other, so that only the collector frees them, and only then is there memory to
    # return to the device.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _has_fixed_positions(pipeline: BaseModel) -> bool:
    kinds = (str(getattr(module, "rope_type", "")) for module in pipeline.modules())
    return not any(kind in _CHANGING_POSITIONS for kind in kinds)


def _to_host(arrays: dict[str, torch.Tensor], device: torch.device) -> dict[str, NDArray[np.float32]]:
    """Copy arrays from a device, and wait for them once."""
    if device.type != "cuda":
        return {name: array.cpu().numpy() for name, array in arrays.items()}
    hosts = {name: torch.empty(array.shape, dtype=array.dtype, pin_memory=True) for name, array in arrays.items()}
    for name, array in arrays.items():
        hosts[name].copy_(array, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return {name: host.numpy() for name, host in hosts.items()}


def _add_zero_row(static: StaticEmbedding) -> None:
    """Add a zero vector to a table, for the token that replaces a text without tokens (see `describe`)."""
    weight = static.embedding.weight.detach()
    table = torch.cat([weight, weight.new_zeros((1, weight.shape[1]))])
    static.embedding = torch.nn.EmbeddingBag.from_pretrained(table, mode=static.embedding.mode)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    # `nbytes` of a quantized tensor is the size at the precision that it replaces.
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes
