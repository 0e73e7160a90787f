"""The torch backend: runs batches of tokens through a pipeline of sentence-transformers, on CPU, CUDA or MPS."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from emb_model_provider.backends.arrays import OutputBuilder, pad_inputs
from emb_model_provider.backends.base import INPUT_IDS, POOLING_MASK, SENTENCE_EMBEDDING, check_ids, check_lengths
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.backends.memory_estimate import torch_bytes
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.precision import resolve_activations, resolve_device, resolve_torch_precision
from emb_model_provider.backends.pytorch.description import describe
from emb_model_provider.backends.pytorch.heads import run_pipeline, serve_pipeline
from emb_model_provider.backends.pytorch.packing import (
    PROBES,
    Packing,
    disagreement,
    packable,
    varlen_available,
    varlen_kernel,
)
from emb_model_provider.backends.pytorch.padding import NOTE as PADDING_NOTE
from emb_model_provider.backends.pytorch.padding import depends_on_padding
from emb_model_provider.backends.pytorch.pipeline import explain_error, load_pipeline, torch_device_facts
from emb_model_provider.backends.pytorch.quantization import PACKAGES, import_packages, quantize_pipeline
from emb_model_provider.backends.repository import Repository
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.base import Outputs, TokenBatch
    from emb_model_provider.backends.pytorch.packing import Kernel
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.snapshots.snapshot import Snapshot


class TorchBackend:
    """A pipeline loaded with PyTorch. One thread creates, uses and closes it."""

    streams = 1
    """Two batches at a time would not be faster, because one batch uses all cores, or the GPU."""

    def __init__(self, spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> None:
        """Load a snapshot, and run one token through it.

        Raises:
            LoadError: It cannot be loaded; for example a DeviceUnavailableError, UnsupportedPrecisionError or
                UnsupportedModelError.
        """
        name = snapshot.repository
        facts = torch_device_facts()
        device = resolve_device(spec.device, facts)
        precision = resolve_torch_precision(spec.precision, device, facts)
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
        served = serve_pipeline(pipeline, plan, Repository.of(snapshot, plan.route))
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
        self._pads = not depends_on_padding(pipeline, description)
        if not self._pads:
            notes = (*notes, PADDING_NOTE)
        self.description = replace(description, notes=(*description.notes, *notes))
        self._table_rows = description.vocab_size
        if isinstance(pipeline[0], StaticEmbedding):
            _add_zero_row(pipeline[0])
            self._table_rows += 1
        self._pipeline: BaseModel | None = pipeline
        self._device = torch.device(device)
        self._packing: Packing | None = None
        if compute != "fp32" and varlen_available(self._device):
            self.pack(varlen_kernel)
        weights = (*pipeline.parameters(), *pipeline.buffers())
        self.memory_bytes = torch_bytes(sum(map(_tensor_bytes, weights)), self.description)

    def run(self, batch: TokenBatch) -> Outputs:
        check_lengths(batch, self.description.max_length)
        builder = OutputBuilder(batch, self.description)
        # Pooling of sentence-transformers supports only one prompt length per batch.
        prompts = batch.prompt_lengths if self.description.excludes_prompt else [0] * len(batch.ids)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (ids, prompt_length) in enumerate(zip(batch.ids, prompts, strict=True)):
            groups.setdefault((prompt_length, 0 if self._pads else len(ids)), []).append(row)
        for (prompt_length, _), rows in groups.items():
            builder.add(rows, self._forward(batch, rows, prompt_length=prompt_length))
        return builder.build()

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        """Compute at fp32 with a temporary copy of the weights; NotImplementedError if these are integers."""
        pipeline, packing, precision = self._pipeline, self._packing, self.description.precision
        if precision in PACKAGES:
            raise NotImplementedError(f"weights at {precision} are not computed at fp32")
        if precision == "fp32" or pipeline is None:
            return self.run(batch)
        self._pipeline, self._packing = copy.deepcopy(pipeline).float(), None
        try:
            if packing is not None:
                packing.undo(self._pipeline)
            return self.run(batch)
        finally:
            self._pipeline, self._packing = pipeline, packing

    @property
    def packs(self) -> bool:
        """Whether batches are packed: their inputs are concatenated instead of padded."""
        return self._packing is not None

    def pack(self, kernel: Kernel) -> None:
        """Pack batches from now on, with `kernel` for attention, if packing does not change the vectors of this model.

        If it does, batches are padded as before, and a note in the description says so.
        """
        if self._pipeline is None or not packable(self._pipeline):
            return
        batch = Tokenization(self.description).encode(PROBES, truncate="END").batch()
        padded = self._vectors(batch)
        alone = np.concatenate([self._vectors(batch.select([row])) for row in range(len(PROBES))])
        packing = Packing(self._pipeline, kernel)
        self._packing = packing
        try:
            reason = disagreement(self._vectors(batch), padded, alone)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, batches are padded
            reason = describe_error(error)
        if reason is None:
            return
        self._packing = None
        packing.undo(self._pipeline)
        note = f"inputs are padded, because packing changes the vectors of this model here ({reason})"
        self.description = replace(self.description, notes=(*self.description.notes, note))

    def close(self) -> None:
        self._pipeline = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _vectors(self, batch: TokenBatch) -> NDArray[np.float32]:
        return self._forward(batch, range(len(batch.ids)))[SENTENCE_EMBEDDING]

    @torch.inference_mode()
    def _forward(
        self, batch: TokenBatch, rows: Sequence[int], *, prompt_length: int = 0
    ) -> dict[str, NDArray[np.float32]]:
        """Return the arrays of the pipeline for some inputs of a batch."""
        if self._pipeline is None:
            raise RuntimeError("the backend is closed")
        features = self._features(self._pipeline, batch, rows)
        if prompt_length:
            features["prompt_length"] = prompt_length
        try:
            arrays = run_pipeline(self._pipeline, features, self.description.arrays)
        except torch.OutOfMemoryError:
            # The memory that PyTorch keeps may be too fragmented for the next attempt.
            torch.cuda.empty_cache()
            raise
        return {name: array.float().cpu().numpy() for name, array in arrays.items()}

    def _features(self, pipeline: BaseModel, batch: TokenBatch, rows: Sequence[int]) -> dict[str, Any]:
        ids = [batch.ids[row] for row in rows]
        if self._packing is not None:
            return self._packing.features(ids, self._to_device(_concatenate(ids)))
        if isinstance(pipeline[0], StaticEmbedding):
            starts = np.cumsum([0, *(len(row) for row in ids[:-1])])
            offsets = torch.from_numpy(starts).to(self._device)
            return {"input_ids": self._to_device(_concatenate(ids)), "offsets": offsets}
        arrays = pad_inputs(batch, rows, max(map(len, ids)), self.description)
        arrays.pop(POOLING_MASK, None)  # `prompt_length` in its place
        tokens = self._to_device(arrays.pop(INPUT_IDS))
        return {INPUT_IDS: tokens, **{name: torch.from_numpy(each).to(self._device) for name, each in arrays.items()}}

    def _to_device(self, ids: NDArray[np.int64]) -> torch.Tensor:
        # Checked first, because on CUDA the lookup of a missing row breaks the CUDA context of the whole process.
        check_ids(ids, self._table_rows)
        return torch.from_numpy(ids).to(self._device)


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


def _concatenate(ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
