"""What the log says of a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from emb_model_provider.compile.floors import shown_cosine

if TYPE_CHECKING:
    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.serving.engine import Engine

logger = logging.getLogger(__name__)


def log_loaded(engine: Engine, snapshot: Snapshot, took_s: float) -> None:
    description = engine.description
    for note in description.notes:
        logger.warning("model %s: %s", engine.spec.alias, note)
    logger.info(
        "model %s is ready: %s at %s from %s, %d dimensions, %d tokens, %s pooling, %s on %s (%s), %s, %s, %.1f s",
        engine.spec.alias, snapshot.repository, snapshot.revision[:12], snapshot.hub, description.dimension,
        description.max_length, description.pooling, description.precision, description.device,
        description.backend, _fidelity_words(description), mebibytes(engine.memory_bytes), took_s,
    )  # fmt: skip


def mebibytes(count: int) -> str:
    """Return a number of bytes for people: `1,024 MiB`."""
    return f"{count / 2**20:,.0f} MiB"


def _fidelity_words(description: ModelDescription) -> str:
    fidelity = description.fidelity
    if fidelity is None:
        return "the reference itself" if description.precision == "fp32" else "fidelity not measured"
    words = [
        f"cosine to fp32 {shown_cosine(fidelity.min_cosine)} or more, mean {shown_cosine(fidelity.mean_cosine)}"
    ]
    if fidelity.top10_overlap is not None:
        words.append(f"{100 * fidelity.top10_overlap:.1f} % of neighbours kept")
    if fidelity.spearman is not None:
        words.append(f"Spearman {shown_cosine(fidelity.spearman)}")
    return f"{', '.join(words)} over {fidelity.texts} texts"
