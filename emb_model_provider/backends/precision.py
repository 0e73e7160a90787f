"""What `auto` becomes, and what a device can do: decided on plain facts, without importing a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emb_model_provider.errors import DeviceUnavailableError, UnsupportedPrecisionError

if TYPE_CHECKING:
    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.model_spec import Precision


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The accelerators that a runtime sees on this machine."""

    cuda_capabilities: tuple[tuple[int, int], ...] = ()
    """Compute capability (major, minor) of each CUDA device, in CUDA's order."""
    mps: bool = False
    """Whether Apple's GPU can be used."""


def resolve_device(requested: str, facts: DeviceFacts) -> str:
    """Return `cpu`, `cuda:N` or `mps` for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises: DeviceUnavailableError where the machine has no such device.
    """
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
                f"cuda:0 to cuda:{count - 1}. Choose one of them, or cpu or auto."
            )
        return f"cuda:{index}"
    raise DeviceUnavailableError(
        f"EMB_PROVIDER_DEVICE={requested} is not a device. Use one of: auto, cpu, cuda, cuda:N, mps."
    )


def resolve_torch_precision(requested: Precision, device: str, facts: DeviceFacts) -> ComputePrecision:
    """Return the precision that the torch backend serves in on `device` (as `resolve_device` gave it).

    Raises: UnsupportedPrecisionError for bf16, int8 and int4 on an Apple GPU.
    """
    if device == "mps":
        if requested == "bf16":
            raise UnsupportedPrecisionError(
                "Precision bf16 is not dependable on Apple GPUs. Use fp16, fp32 or auto."
            )
        if requested in ("int8", "int4"):
            raise UnsupportedPrecisionError(
                f"Precision {requested} cannot be had on Apple GPUs: the libraries that quantize have no kernels for "
                "them. Use fp16, fp32 or auto there, or set EMB_PROVIDER_DEVICE=cpu (or auto), where the compiled "
                "engine serves int8 and int4."
            )
    if requested != "auto":
        return requested
    if device.startswith("cuda"):
        return _half_precision(device, facts)
    # On a CPU plain bf16 weights fall to cosine 0.9965 of fp32, and fp16 is slower than fp32.
    return "fp32"


def resolve_activations(
    precision: ComputePrecision, device: str, facts: DeviceFacts, *, native_bf16: bool
) -> Literal["fp32", "fp16", "bf16"]:
    """Return what the torch backend computes in where the weights are held in `precision`.

    For int8 and int4 it is the device's fastest type that is true to them; `native_bf16` is whether the processor
    multiplies bf16 itself. For all others it is the precision.
    """
    if precision in ("fp32", "fp16", "bf16"):
        return precision
    if device.startswith("cuda"):
        return _half_precision(device, facts)
    # Measured with int8 weights: min cosine 0.9992 in place of 0.9993, and 1.7 times as fast.
    return "bf16" if native_bf16 else "fp32"


def _half_precision(device: str, facts: DeviceFacts) -> Literal["fp16", "bf16"]:
    major, _ = facts.cuda_capabilities[int(device.partition(":")[2] or 0)]
    # Before Ampere (8.0) bf16 is emulated: slower than fp32, and less exact than fp16.
    return "bf16" if major >= 8 else "fp16"
