"""The torch backend: token batches through a sentence-transformers module pipeline, on CPU, CUDA or MPS."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from emb_model_provider.backends.base import ModelDescription, TokenBatch
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.backends.memory_estimate import torch_bytes
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.precision import (
    resolve_activations,
    resolve_device,
    resolve_torch_precision,
)
from emb_model_provider.backends.pytorch.description import describe
from emb_model_provider.backends.pytorch.packing import (
    PROBES,
    Packing,
    disagreement,
    packable,
    varlen_available,
    varlen_kernel,
)
from emb_model_provider.backends.pytorch.pipeline import (
    explained,
    load_pipeline,
    strip_final_normalize,
    torch_device_facts,
)
from emb_model_provider.backends.pytorch.quantization import PACKAGES, quantize_pipeline, require_packages
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import InferenceError, LoadError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.backends.pipeline_plan import PipelinePlan
    from emb_model_provider.backends.precision import DeviceFacts
    from emb_model_provider.backends.pytorch.packing import Kernel
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.snapshots.snapshot import Snapshot


class TorchBackend:
    """A pipeline held by PyTorch. It is created, used and closed by one thread."""

    description: ModelDescription
    memory_bytes: int
    streams = 1
    """PyTorch spreads one batch over all cores, or the GPU runs them in turn: two at a time gain nothing."""

    def __init__(self, spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> None:
        """Load a snapshot, and run one token through it.

        Raises: DeviceUnavailableError, UnsupportedPrecisionError, UnsupportedModelError or LoadError.
        """
        facts = torch_device_facts()
        device = resolve_device(spec.device, facts)
        precision = resolve_torch_precision(spec.precision, device, facts)
        require_packages(precision)
        plan = plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)
        pipeline, notes = _load(plan, precision, device, facts, trust_remote_code=trust_remote_code)
        # sentence-transformers cuts to truncate_dim after the last module. A Normalize before that cut is not the
        # model's last step: it stays, and the cut vectors are shorter than 1, as `encode` gives them.
        cut_after_normalize = plan.truncate_dim is not None and plan.normalize is None
        normalize = False if cut_after_normalize else strip_final_normalize(pipeline)
        self._pipeline: SentenceTransformer | None = pipeline
        self._static = isinstance(pipeline[0], StaticEmbedding)
        self._device = torch.device(device)
        self._truncate_dim = plan.truncate_dim
        # Enough for the trial run of one token, which tells the dimension.
        self._vocab_size, self._pad_token_id = 1, 0
        self._padding_side: Literal["left", "right"] = "right"
        self._packing: Packing | None = None
        try:
            dimension = self._forward([[0]], prompt_length=0).shape[1]
        except Exception as error:
            raise LoadError(
                f"{snapshot.repository} was loaded but cannot embed: {type(error).__name__}: {error}"
            ) from error
        description = describe(
            pipeline,
            plan,
            dimension=dimension,
            normalize=normalize,
            precision=precision,
            device=device,
            backend="torch",
        )
        self.description = replace(description, notes=(*description.notes, *notes))
        self._vocab_size = self.description.vocab_size
        self._pad_token_id = self.description.pad_token_id
        self._padding_side = self.description.padding_side
        half = resolve_activations(precision, device, facts, native_bf16=False) != "fp32"
        if half and varlen_available(self._device):
            self.pack(varlen_kernel)
        weights = (*pipeline.parameters(), *pipeline.buffers())
        self.memory_bytes = torch_bytes(sum(map(_held_bytes, weights)), self.description)

    def embed(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return float32 vectors of shape (inputs, dimension), before a final length normalization.

        Raises: InferenceError where a row is longer than the model reads or holds an id it does not know; else
        whatever PyTorch raises. The backend stays usable.
        """
        longest = max(map(len, batch.ids))
        if longest > self.description.max_length:
            raise InferenceError(
                f"An input of {longest} tokens reached a model that reads {self.description.max_length}."
            )
        if not self.description.excludes_prompt:
            return self._forward(batch.ids, prompt_length=0)
        lengths = sorted(set(batch.prompt_lengths))
        if len(lengths) == 1:
            return self._forward(batch.ids, prompt_length=lengths[0])
        # sentence-transformers' Pooling knows one prompt length per batch.
        vectors = np.empty((len(batch.ids), self.description.dimension), dtype=np.float32)
        for length in lengths:
            rows = [row for row, own in enumerate(batch.prompt_lengths) if own == length]
            vectors[rows] = self._forward([batch.ids[row] for row in rows], prompt_length=length)
        return vectors

    def embed_fp32(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Return the same vectors computed at fp32, from a copy of the weights that lives as long as the call.

        Raises: NotImplementedError where weights are integers; what `embed` raises.
        """
        own, packing, precision = self._pipeline, self._packing, self.description.precision
        if precision in PACKAGES:
            raise NotImplementedError(f"weights at {precision} are not computed at fp32")
        if precision == "fp32" or own is None:
            return self.embed(batch)
        self._pipeline, self._packing = copy.deepcopy(own).float(), None
        try:
            if packing is not None:
                packing.undo(self._pipeline)
            return self.embed(batch)
        finally:
            self._pipeline, self._packing = own, packing

    @property
    def packs(self) -> bool:
        """Whether inputs run end to end, without padding."""
        return self._packing is not None

    def pack(self, kernel: Kernel) -> None:
        """Run inputs without padding from now on, by `kernel`, where this model gives the same vectors so.

        Where it does not, it stays padded, and `description.notes` says so.
        """
        if self._pipeline is None or not packable(self._pipeline):
            return
        ids = Tokenization(self.description).encode(PROBES, prompt="", truncate="END").ids
        padded = self._forward(ids, prompt_length=0)
        alone = np.concatenate([self._forward([row], prompt_length=0) for row in ids])
        packing = Packing(self._pipeline, kernel=kernel)
        self._packing = packing
        try:
            reason = disagreement(self._forward(ids, prompt_length=0), padded, alone)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises, padded rows are served
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if reason is None:
            return
        self._packing = None
        packing.undo(self._pipeline)
        note = f"inputs are padded: without padding the model gives other vectors here ({reason})"
        self.description = replace(self.description, notes=(*self.description.notes, note))

    def close(self) -> None:
        """Free the model's memory. The backend is not used again."""
        self._pipeline = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]], *, prompt_length: int) -> NDArray[np.float32]:
        if self._pipeline is None:
            raise RuntimeError("the backend is closed")
        if self._static:
            features: dict[str, Any] = self._bags(ids)
        elif self._packing is not None:
            features = self._packing.features(ids, self._tokens(_end_to_end(ids)))
        else:
            features = self._padded(ids)
        if prompt_length:
            features["prompt_length"] = prompt_length
        try:
            vectors: torch.Tensor = self._pipeline(features)["sentence_embedding"]
        except torch.OutOfMemoryError:
            # What PyTorch keeps for later may be in pieces too small for the next try.
            torch.cuda.empty_cache()
            raise
        return vectors[:, : self._truncate_dim].float().cpu().numpy()

    def _padded(self, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        batch = TokenBatch(ids=ids, prompt_lengths=())
        tokens, mask = batch.padded(self._pad_token_id, self._padding_side)
        return {"input_ids": self._tokens(tokens), "attention_mask": torch.from_numpy(mask).to(self._device)}

    def _bags(self, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return all ids end to end and where each input starts, as static embeddings read them."""
        starts = np.cumsum([0, *(len(row) for row in ids[:-1])])
        return {
            "input_ids": self._tokens(_end_to_end(ids)),
            "offsets": torch.from_numpy(starts).to(self._device),
        }

    def _tokens(self, ids: NDArray[np.int64]) -> torch.Tensor:
        # On CUDA, looking up a row that is not there ends the whole process's context, so it is refused here.
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InferenceError(
                f"An input holds token id {wrong}; the model knows 0 to {self._vocab_size - 1}."
            )
        return torch.from_numpy(ids).to(self._device)


def _load(
    plan: PipelinePlan,
    precision: ComputePrecision,
    device: str,
    facts: DeviceFacts,
    *,
    trust_remote_code: bool,
) -> tuple[SentenceTransformer, tuple[str, ...]]:
    """Return a plan's pipeline on `device`, its weights in `precision`, and notes for the operator."""
    computes_in = resolve_activations(precision, device, facts, native_bf16=native_bf16())
    if precision not in PACKAGES:
        pipeline = load_pipeline(
            plan, precision=computes_in, device=device, trust_remote_code=trust_remote_code
        )
        return pipeline, ()
    pipeline = load_pipeline(plan, precision=computes_in, device="cpu", trust_remote_code=trust_remote_code)
    try:
        notes = quantize_pipeline(pipeline, precision=precision, device=device)
    except LoadError:
        raise
    except Exception as error:
        raise explained(error, plan) from error
    return pipeline, notes


def _held_bytes(tensor: torch.Tensor) -> int:
    # A quantized one says what it would take at the precision that it stands for.
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_held_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def _end_to_end(ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
