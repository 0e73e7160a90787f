"""A model as sentence-transformers has it: the pipeline that compiled models are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emb_model_provider.backends.pipeline import plan_pipeline
from emb_model_provider.backends.precision import resolve_device, resolve_torch_precision
from emb_model_provider.backends.quiet_imports import quiet_imports
from emb_model_provider.errors import UnsupportedPrecisionError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.model_spec import ModelSpec, Precision


def load_reference(
    spec: ModelSpec, snapshot: Snapshot, precision: Precision, *, trust_remote_code: bool
) -> SentenceTransformer:
    """Load a snapshot with sentence-transformers on the device of `spec`, with the pooling that it declares.

    Raises: LoadError; UnsupportedPrecisionError for int8 and int4; ImportError without torch.
    """
    if precision in ("int8", "int4"):
        raise UnsupportedPrecisionError(
            f"Precision {precision} is not available here: choose fp32, fp16, bf16 or auto. `Embedder` and the "
            "service have it."
        )
    # Imported only here: the service manages models without torch.
    with quiet_imports():
        from emb_model_provider.backends.torch_pipeline import load_pipeline, torch_device_facts

    facts = torch_device_facts()
    device = resolve_device(spec.device, facts)
    plan = plan_pipeline(spec, snapshot, trust_remote_code=trust_remote_code)
    return load_pipeline(
        plan,
        precision=resolve_torch_precision(precision, device, facts),
        device=device,
        trust_remote_code=trust_remote_code,
    )
