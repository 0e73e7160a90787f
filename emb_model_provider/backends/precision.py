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
    lowest_capability: tuple[int, int] = (0, 0)
    """The oldest device for which PyTorch has kernels."""
    cuda_problem: str = ""
    """Why PyTorch cannot use the CUDA devices of this machine, such as a driver that is too old. Empty: not known."""
    mps: bool = False
    """Whether an Apple GPU can be used."""


_DEVICE = "`--device`, or EMB_PROVIDER_DEVICE"


def resolve_device(requested: str, facts: DeviceFacts) -> str:
    """Return `cpu`, `cuda:N` or `mps` for a requested device, which can be `auto` or `cuda`, too."""
    count = len(facts.cuda_capabilities)
    kind, _, number = requested.strip().lower().partition(":")
    usable = [index for index, each in enumerate(facts.cuda_capabilities) if each >= facts.lowest_capability]
    if kind == "auto" and not number:
        return f"cuda:{usable[0]}" if usable else "cpu"
    if kind == "cpu" and not number:
        return "cpu"
    if kind == "mps" and not number:
        if not facts.mps:
            raise DeviceUnavailableError(
                f"Device mps: this machine has no Apple GPU that PyTorch can use. Set it to cpu or auto: {_DEVICE}."
            )
        return "mps"
    if kind == "cuda" and (not number or number.isdecimal()):
        index = int(number or 0)
        if not count and facts.cuda_problem:
            raise DeviceUnavailableError(
                f"EMB_PROVIDER_DEVICE={requested}: {facts.cuda_problem}. Or set EMB_PROVIDER_DEVICE=cpu or auto."
            )
        if not count:
            raise DeviceUnavailableError(
                f"Device {requested}: PyTorch sees no CUDA device here. Set it to cpu or auto ({_DEVICE}), or check that the "
                "NVIDIA driver is installed, that CUDA_VISIBLE_DEVICES does not hide the device, that a container was "
                "started with --gpus, and that PyTorch is a CUDA build."
            )
        if index >= count:
            raise DeviceUnavailableError(
                f"Device {requested}: this machine has {count} CUDA device(s), cuda:0 to cuda:{count - 1}. Set it to one of "
                f"them, or to cpu or auto: {_DEVICE}."
            )
        if index not in usable:
            raise DeviceUnavailableError(
                f"EMB_PROVIDER_DEVICE={requested}: cuda:{index} has compute capability "
                f"{_dotted(facts.cuda_capabilities[index])}, and this build of PyTorch has kernels from "
                f"{_dotted(facts.lowest_capability)}. Set EMB_PROVIDER_DEVICE=cpu or auto, or install a build of PyTorch for an "
                "older CUDA version."
            )
        return f"cuda:{index}"
    raise DeviceUnavailableError(
        f"Device {requested} is not a device. Use one of auto, cpu, cuda, cuda:N, mps: {_DEVICE}."
    )


def resolve_torch_precision(
    requested: Precision, device: str, facts: DeviceFacts, *, stored_bf16: bool = False
) -> ComputePrecision:
    """Return the precision that the torch backend serves in on a device that `resolve_device` returned.

    `stored_bf16` says whether the weights are stored at bf16, whose range fp16 may not have.
    """
    if device == "mps":
        if requested == "bf16":
            raise UnsupportedPrecisionError("Precision bf16 is not reliable on Apple GPUs. Use fp16, fp32 or auto.")
        if requested in ("int8", "int4"):
            raise UnsupportedPrecisionError(
                f"Precision {requested} is not available on Apple GPUs, because the quantization libraries have no "
                f"kernels for them. Use fp16, fp32 or auto, or the device cpu ({_DEVICE}), so that OpenVINO serves "
                f"{requested}."
            )
    if requested != "auto":
        return requested
    if device.startswith("cuda"):
        # Both are equally fast. fp16 has three more bits.
        return _half_precision(device, facts) if stored_bf16 else "fp16"
    # On a CPU fp16 is slower than fp32, and small models with random weights reach a cosine of only 0.98 at bf16.
    return "fp32"


def accurate_precisions(first: ComputePrecision, device: str, facts: DeviceFacts) -> tuple[ComputePrecision, ...]:
    """Return the precisions that `auto` tries one after the other, until one is accurate enough."""
    if first == "fp32" or not device.startswith("cuda"):
        return tuple(dict.fromkeys((first, "fp32")))
    return tuple(dict.fromkeys((first, _half_precision(device, facts), "fp16", "fp32")))


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


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _half_precision(device: str, facts: DeviceFacts) -> Literal["fp16", "bf16"]:
    major, _ = facts.cuda_capabilities[int(device.partition(":")[2] or 0)]
    # Before Ampere (8.0) bf16 is emulated, which is slower than fp32 and less precise than fp16.
    return "bf16" if major >= 8 else "fp16"
