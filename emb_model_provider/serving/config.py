"""Configuration that the engines of one service share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emb_model_provider.backends.base import TERM_WEIGHTS
from emb_model_provider.serving.batcher import BatchPolicy
from emb_model_provider.serving.result_cache import ResultCache
from emb_model_provider.settings import BatchSettings, LimitSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.serving.jobs import BatchRecord, StageRecord

_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 512, 131_072
"""On a CPU larger batches raise the throughput hardly at all, but every request waits for the end of its batch and of
the one before (see docs/performance.md)."""
_PACKED_CPU_BATCH_TOKENS, _PACKED_GPU_BATCH_TOKENS = 16_384, 65_536
"""Without padding all of these tokens are computed. A GPU is at its full rate at about 32,000, and on a CPU only static
embeddings have no padding, of which it adds up millions per second."""
_BATCH_SIZE, _PACKED_BATCH_SIZE = 64, 1024
_GPU_SHARED_FROM_TOKENS = 8_192
"""A smaller batch does not occupy a whole GPU, so that two halves of it take as long as two of it."""
_CPU_TOKENS_PER_S, _GPU_TOKENS_PER_S = 5_000.0, 100_000.0
_MOST_TERM_WEIGHTS = 2**29
"""Largest number of weights that a sparse model computes for a batch, one per token and word of its vocabulary: 2 GiB."""
_CPU_FREE_TOKENS, _GPU_FREE_TOKENS = 256, 2_048
_BACKGROUND_TOKENS = 32_768
"""Background batches are not larger, because requests wait for their end. A GPU is at its full rate at this size."""


QUEUE_BYTES = 250 * 1000**2
"""Memory of the requests that wait for one model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How long the service waits in unusual situations, in seconds."""

    restart_pauses_s: tuple[float, ...] = (0.0, 1.0, 4.0)
    """Pauses before the restarts of a crashed model. It fails after as many restarts within ten minutes."""
    retry_after_failure_s: float = 30.0
    """How long a model that failed is not loaded again."""
    lowered_budget_s: float = 60.0
    """How long batches stay small after one did not fit into memory."""
    stop_s: float = 5.0
    """How long a model may take to stop when all its requests are answered or cancelled."""
    slow_load_s: float = 300.0
    """How long a load may take before it is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Configuration that the engines of one service share."""

    batching: BatchSettings = field(default_factory=BatchSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    queue_bytes: int = QUEUE_BYTES
    """Without MAX_QUEUE_TOKENS, the requests of a model take this much memory at most."""
    watchdog_s: float = 60.0
    """After how many seconds a batch counts as hung."""
    on_batch: Callable[[BatchRecord], None] = lambda _: None
    """Called on a thread of the model after each batch."""
    result_cache: ResultCache = field(default_factory=lambda: ResultCache(0))
    on_lookup: Callable[[str, int, int], None] = lambda _model, _hits, _misses: None
    """Called with the alias of a model for each request: how many of its different inputs have a vector in the cache, and
    how many must be computed."""
    on_stages: Callable[[StageRecord], None] = lambda _: None
    """Called on the event loop for each request that has its results."""
    timings: Timings = field(default_factory=Timings)


def batch_policy(settings: BatchSettings, description: ModelDescription) -> BatchPolicy:
    """Return the batch policy for a model. The settings take precedence over the default of its device."""
    on_cpu = description.device == "cpu"
    defaults = (
        (_PACKED_CPU_BATCH_TOKENS, _PACKED_GPU_BATCH_TOKENS)
        if description.packs
        else (_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS)
    )
    tokens = settings.max_batch_tokens or defaults[0 if on_cpu else 1]
    described = (description, *description.routes.values())
    widest = max((each.dimension for each in described if TERM_WEIGHTS in each.arrays), default=0)
    if widest:
        tokens = min(tokens, max(1, _MOST_TERM_WEIGHTS // widest))
    if settings.max_batch_tokens is None and description.max_batch_tokens is not None:
        tokens = min(tokens, description.max_batch_tokens)
    return BatchPolicy(
        max_batch_size=settings.max_batch_size or (_PACKED_BATCH_SIZE if description.packs else _BATCH_SIZE),
        max_batch_tokens=tokens,
        min_batch_size=settings.min_batch_size,
        max_wait_s=settings.max_wait_time_ms / 1000,
        dynamic=settings.enable_dynamic_batching,
        free_padded_tokens=_CPU_FREE_TOKENS if on_cpu else _GPU_FREE_TOKENS,
        packs=description.packs,
        shared_from_tokens=0 if on_cpu else _GPU_SHARED_FROM_TOKENS,
        max_background_tokens=_BACKGROUND_TOKENS,
        assumed_tokens_per_s=_CPU_TOKENS_PER_S if on_cpu else _GPU_TOKENS_PER_S,
    )
