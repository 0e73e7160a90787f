"""Fused RMSNorm: one kernel in the place of the six to eight that the modules of transformers start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

_TOLERANCE = 2**-7
"""Largest difference of the results of the two forms, relative to their values: two steps of bf16."""
_ROWS = 4


class FusedRMSNorm(torch.nn.Module):
    """Divides vectors by their root mean square, and multiplies them by weights."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


def fuse_norms(pipeline: BaseModel) -> int:
    """Replace each RMSNorm of transformers whose results a fused one returns; return the number of replaced modules.

    They are compared on random vectors, because classes of this name differ: that of Gemma adds 1 to its weights.
    """
    count = 0
    for module in list(pipeline.modules()):
        for name, child in list(module.named_children()):
            kind = type(child)
            if not kind.__name__.endswith("RMSNorm") or not kind.__module__.startswith("transformers.models."):
                continue
            if (fused := _fused(child)) is not None:
                setattr(module, name, fused)
                count += 1
    return count


@torch.inference_mode()
def _fused(norm: Any) -> FusedRMSNorm | None:
    """Return a module with the results of a norm, or None if it computes something else."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    parameters = dict(norm.named_parameters())
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float) or len(parameters) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    vectors = (
        torch.randn((1, _ROWS, weight.shape[0]), generator=generator) * torch.tensor([0.01, 1.0, 3.0, 30.0])[:, None]
    )
    vectors = vectors.to(device=weight.device, dtype=weight.dtype)
    try:
        expected = norm(vectors).float()
        for candidate in (weight.detach(), weight.detach() + 1):
            fused = FusedRMSNorm(candidate.clone(), eps)
            if torch.allclose(fused(vectors).float(), expected, rtol=_TOLERANCE, atol=1e-6):
                return fused
    except Exception:  # noqa: BLE001 - a norm with other parameters is not replaced
        return None
    return None
