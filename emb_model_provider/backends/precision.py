"""Resolves the device and the precision of the torch backend, without importing a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emb_model_provider.errors import DeviceUnavailableError, UnsupportedPrecisionError

if TYPE_CHECKING:
    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.model_spec import Precision


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The accelerators that PyTorch can use on this machine."""

    cuda_capabilities: tuple[tuple[int, int], ...] = ()
    """Compute capability (major, minor) of each CUDA device, by index."""
    mps: bool = False
    """Whether an Apple GPU can be used."""


def resolve_device(requested: str, facts: DeviceFacts) -> str:
    """Return `cpu`, `cuda:N` or `mps` for a requested device, which can be `auto` or `cuda`, too."""
    count = len(facts.cuda_capabilities)
    kind, _, number = requested.strip().lower().partition(":")
    if kind == "auto" and not number:
        return "cuda:0" if count else "cpu"
    if kind == "cpu" and not number:
        return "cpu"
    if kind == "mps" and not number:
        if not facts.mps:
            raise DeviceUnavailableError(
                "EMB_PROVIDER_DEVICE=mps: this machine has no Apple GPU that PyTorch can use. "
                "Set EMB_PROVIDER_DEVICE=cpu or auto."
            )
        return "mps"
    if kind == "cuda" and (not number or number.isdecimal()):
        index = int(number or 0)
        if not count:
            raise DeviceUnavailableError(
                f"EMB_PROVIDER_DEVICE={requested}: PyTorch sees no CUDA device here. Set EMB_PROVIDER_DEVICE=cpu "
                "or auto, or check that the NVIDIA driver is installed, that CUDA_VISIBLE_DEVICES does not hide "
                "the device, that a container was started with --gpus, and that PyTorch is a CUDA build."
            )
        if index >= count:
            raise DeviceUnavailableError(
                f"EMB_PROVIDER_DEVICE={requested}: this machine has {count} CUDA device(s), "
                f"cuda:0 to cuda:{count - 1}. Set it to one of them, or to cpu or auto."
            )
        return f"cuda:{index}"
    raise DeviceUnavailableError(
        f"EMB_PROVIDER_DEVICE={requested} is not a device. Use one of: auto, cpu, cuda, cuda:N, mps."
    )


def resolve_torch_precision(requested: Precision, device: str, facts: DeviceFacts) -> ComputePrecision:
    """Return the precision that the torch backend serves in on a device that `resolve_device` returned."""
    if device == "mps":
        if requested == "bf16":
            raise UnsupportedPrecisionError("Precision bf16 is not reliable on Apple GPUs. Use fp16, fp32 or auto.")
        if requested in ("int8", "int4"):
            raise UnsupportedPrecisionError(
                f"Precision {requested} is not available on Apple GPUs, because the quantization libraries have no "
                "kernels for them. Use fp16, fp32 or auto, or set EMB_PROVIDER_DEVICE=cpu (or auto), so that OpenVINO "
                f"serves {requested}."
            )
    if requested != "auto":
        return requested
    if device.startswith("cuda"):
        return _half_precision(device, facts)
    # On a CPU, bf16 weights reach a cosine of only 0.9965 to fp32, and fp16 is slower than fp32.
    return "fp32"


def resolve_activations(
    precision: ComputePrecision, device: str, facts: DeviceFacts, *, native_bf16: bool
) -> Literal["fp32", "fp16", "bf16"]:
    """Return the precision in which the torch backend computes activations: that of the weights.

    For integer weights it is the fastest type of the device that is accurate enough.
    """
    if precision in ("fp32", "fp16", "bf16"):
        return precision
    if device.startswith("cuda"):
        return _half_precision(device, facts)
    # With int8 weights bf16 costs 0.0001 of the lowest cosine, and is 1.7 times as fast (see docs/precision.md).
    return "bf16" if native_bf16 else "fp32"


def _half_precision(device: str, facts: DeviceFacts) -> Literal["fp16", "bf16"]:
    major, _ = facts.cuda_capabilities[int(device.partition(":")[2] or 0)]
    # Before Ampere (8.0) bf16 is emulated, which is slower than fp32 and less precise than fp16.
    return "bf16" if major >= 8 else "fp16"
