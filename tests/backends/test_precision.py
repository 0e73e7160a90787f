"""Devices and precisions are resolved, or rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emb_model_provider.backends.precision import (
    DeviceFacts,
    accurate_precisions,
    resolve_activations,
    resolve_device,
    resolve_torch_precision,
)
from emb_model_provider.errors import DeviceUnavailableError, UnsupportedPrecisionError

NO_GPU = DeviceFacts()
TURING = DeviceFacts(cuda_capabilities=((7, 5),))
TWO_HOPPERS = DeviceFacts(cuda_capabilities=((9, 0), (9, 0)))
APPLE = DeviceFacts(mps=True)


@pytest.mark.parametrize(
    ("requested", "facts", "device"),
    [
        ("auto", NO_GPU, "cpu"),
        ("auto", TURING, "cuda:0"),
        ("auto", APPLE, "cpu"),
        ("cpu", TURING, "cpu"),
        ("cuda", TWO_HOPPERS, "cuda:0"),
        ("CUDA:1", TWO_HOPPERS, "cuda:1"),
        ("mps", APPLE, "mps"),
    ],
)
def test_devices(requested: str, facts: DeviceFacts, device: str) -> None:
    """auto is CUDA if there is a device, else the CPU."""
    assert resolve_device(requested, facts) == device


@pytest.mark.parametrize(
    ("requested", "facts", "message"),
    [
        ("cuda", NO_GPU, "no CUDA device"),
        ("cuda:0", NO_GPU, "no CUDA device"),
        ("cuda:7", TWO_HOPPERS, "cuda:0 to cuda:1"),
        ("mps", NO_GPU, "no Apple GPU"),
        ("tpu", NO_GPU, "not a device"),
        ("cuda:x", TWO_HOPPERS, "not a device"),
        ("cpu:0", NO_GPU, "not a device"),
    ],
)
def test_a_missing_device_is_an_error(requested: str, facts: DeviceFacts, message: str) -> None:
    """The message names the value, other values, the flag and the setting."""
    with pytest.raises(DeviceUnavailableError, match=message) as caught:
        resolve_device(requested, facts)
    assert caught.value.message.startswith(f"Device {requested}")
    assert "`--device`, or EMB_PROVIDER_DEVICE" in caught.value.message
    assert "auto" in caught.value.message


@pytest.mark.parametrize(
    ("device", "facts", "precision"),
    [("cpu", NO_GPU, "fp32"), ("cuda:0", TURING, "fp16"), ("cuda:1", TWO_HOPPERS, "fp16"), ("mps", APPLE, "fp32")],
)
def test_auto_precision(device: str, facts: DeviceFacts, precision: str) -> None:
    """auto is fp32 on a CPU, and on CUDA fp16, which is as fast as bf16 and has three more bits."""
    assert resolve_torch_precision("auto", device, facts) == precision


@pytest.mark.parametrize(
    ("device", "facts", "order"),
    [
        ("cuda:0", TWO_HOPPERS, ("bf16", "fp16", "fp32")),
        ("cuda:0", TURING, ("fp16", "fp32")),
        ("cpu", NO_GPU, ("fp32",)),
    ],
)
def test_auto_begins_with_the_precision_of_the_files_at_bf16(
    device: str, facts: DeviceFacts, order: tuple[str, ...]
) -> None:
    """If the device computes in it natively, because the values of such a model can exceed the range of fp16."""
    first = resolve_torch_precision("auto", device, facts, stored_bf16=True)
    assert accurate_precisions(first, device, facts) == order


def test_auto_tries_every_faster_precision_before_fp32() -> None:
    assert accurate_precisions("fp16", "cuda:0", TWO_HOPPERS) == ("fp16", "bf16", "fp32")
    assert accurate_precisions("fp16", "cuda:0", TURING) == ("fp16", "fp32")


OLD_AND_NEW = DeviceFacts(cuda_capabilities=((6, 1), (8, 6)), lowest_capability=(7, 5))


def test_devices_without_kernels_are_not_used() -> None:
    """auto takes another one or the CPU; a device that was requested is an error."""
    assert resolve_device("auto", OLD_AND_NEW) == "cuda:1"
    assert resolve_device("cuda:1", OLD_AND_NEW) == "cuda:1"
    assert resolve_device("auto", replace(OLD_AND_NEW, cuda_capabilities=((6, 1),))) == "cpu"
    with pytest.raises(DeviceUnavailableError, match=r"cuda:0 has compute capability 6\.1.*from 7\.5"):
        resolve_device("cuda", OLD_AND_NEW)


def test_the_error_says_why_a_device_cannot_be_used() -> None:
    facts = DeviceFacts(cuda_problem="the NVIDIA driver is too old: it supports CUDA 12.2. Update the driver")
    with pytest.raises(DeviceUnavailableError, match="EMB_PROVIDER_DEVICE=cuda: the NVIDIA driver is too old"):
        resolve_device("cuda", facts)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_requested_precision_is_used(precision: str, device: str) -> None:
    assert resolve_torch_precision(precision, device, TURING) == precision  # type: ignore[arg-type]  # from a list


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_precisions_on_an_apple_gpu_are_an_error(precision: str) -> None:
    """The message names precisions and a device that can be used."""
    with pytest.raises(
        UnsupportedPrecisionError, match=f"{precision} is not available on Apple.*fp16.*device cpu \\(`--device`"
    ):
        resolve_torch_precision(precision, "mps", APPLE)  # type: ignore[arg-type]  # from a list


@pytest.mark.parametrize(
    ("precision", "device", "facts", "native_bf16", "activations"),
    [
        ("int8", "cpu", NO_GPU, False, "fp32"),
        ("int8", "cpu", NO_GPU, True, "bf16"),
        ("int4", "cpu", NO_GPU, False, "fp32"),
        ("int4", "cuda:1", TWO_HOPPERS, False, "bf16"),
        ("int8", "cuda:0", TURING, True, "fp16"),
        ("fp32", "cuda:0", TWO_HOPPERS, True, "fp32"),
        ("fp16", "cpu", NO_GPU, True, "fp16"),
    ],
)
def test_activations(precision: str, device: str, facts: DeviceFacts, native_bf16: bool, activations: str) -> None:
    """Integer weights are computed in the fastest precision of the device; the others in their own."""
    resolved = resolve_activations(precision, device, facts, native_bf16=native_bf16)  # type: ignore[arg-type]  # from a list
    assert resolved == activations


def test_bf16_on_an_apple_gpu_is_an_error() -> None:
    """Its support depends on the version of macOS."""
    with pytest.raises(UnsupportedPrecisionError, match="fp16"):
        resolve_torch_precision("bf16", "mps", APPLE)
