"""What `auto` becomes, and which devices and precisions are refused."""

from __future__ import annotations

import pytest

from emb_model_provider.backends.precision import (
    DeviceFacts,
    resolve_activations,
    resolve_device,
    resolve_torch_precision,
)
from emb_model_provider.errors import DeviceUnavailableError, UnsupportedPrecisionError

NOTHING = DeviceFacts()
TURING = DeviceFacts(cuda_capabilities=((7, 5),))
TWO_HOPPERS = DeviceFacts(cuda_capabilities=((9, 0), (9, 0)))
APPLE = DeviceFacts(mps=True)


@pytest.mark.parametrize(
    ("requested", "facts", "device"),
    [
        ("auto", NOTHING, "cpu"),
        ("auto", TURING, "cuda:0"),
        ("auto", APPLE, "cpu"),
        ("cpu", TURING, "cpu"),
        ("cuda", TWO_HOPPERS, "cuda:0"),
        ("CUDA:1", TWO_HOPPERS, "cuda:1"),
        ("mps", APPLE, "mps"),
    ],
)
def test_devices(requested: str, facts: DeviceFacts, device: str) -> None:
    """auto takes CUDA where there is one, else the CPU; the rest is taken at its word."""
    assert resolve_device(requested, facts) == device


@pytest.mark.parametrize(
    ("requested", "facts", "says"),
    [
        ("cuda", NOTHING, "no CUDA device"),
        ("cuda:0", NOTHING, "no CUDA device"),
        ("cuda:7", TWO_HOPPERS, "cuda:0 to cuda:1"),
        ("mps", NOTHING, "no Apple GPU"),
        ("tpu", NOTHING, "not a device"),
        ("cuda:x", TWO_HOPPERS, "not a device"),
        ("cpu:0", NOTHING, "not a device"),
    ],
)
def test_a_device_that_is_not_there_is_refused(requested: str, facts: DeviceFacts, says: str) -> None:
    """The message names the setting, the value, and what to set instead."""
    with pytest.raises(DeviceUnavailableError, match=says) as caught:
        resolve_device(requested, facts)
    assert f"EMB_PROVIDER_DEVICE={requested}" in caught.value.message
    assert "auto" in caught.value.message


@pytest.mark.parametrize(
    ("device", "facts", "precision"),
    [
        ("cpu", NOTHING, "fp32"),
        ("cuda:0", TURING, "fp16"),
        ("cuda:1", TWO_HOPPERS, "bf16"),
        ("mps", APPLE, "fp32"),
    ],
)
def test_auto_precision(device: str, facts: DeviceFacts, precision: str) -> None:
    """auto is fp32 on a CPU, and on CUDA bf16 where the hardware has it, else fp16."""
    assert resolve_torch_precision("auto", device, facts) == precision


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_precision_that_was_asked_for_is_taken(precision: str, device: str) -> None:
    """No precision is swapped for another behind the operator's back."""
    assert resolve_torch_precision(precision, device, TURING) == precision  # type: ignore[arg-type]  # from a list


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_precisions_on_an_apple_gpu_are_refused(precision: str) -> None:
    """The message names the precision, what that GPU can do, and where int8 and int4 are to be had."""
    with pytest.raises(
        UnsupportedPrecisionError, match=f"{precision} cannot be had on Apple.*fp16.*DEVICE=cpu"
    ):
        resolve_torch_precision(precision, "mps", APPLE)  # type: ignore[arg-type]  # from a list


@pytest.mark.parametrize(
    ("precision", "device", "facts", "native_bf16", "activations"),
    [
        ("int8", "cpu", NOTHING, False, "fp32"),
        ("int8", "cpu", NOTHING, True, "bf16"),
        ("int4", "cpu", NOTHING, False, "fp32"),
        ("int4", "cuda:1", TWO_HOPPERS, False, "bf16"),
        ("int8", "cuda:0", TURING, True, "fp16"),
        ("fp32", "cuda:0", TWO_HOPPERS, True, "fp32"),
        ("fp16", "cpu", NOTHING, True, "fp16"),
    ],
)
def test_activations(
    precision: str, device: str, facts: DeviceFacts, native_bf16: bool, activations: str
) -> None:
    """Integer weights are computed with in what the device is good at; other precisions in themselves."""
    found = resolve_activations(precision, device, facts, native_bf16=native_bf16)  # type: ignore[arg-type]  # from a list
    assert found == activations


def test_bf16_on_an_apple_gpu_is_refused() -> None:
    """Its support depends on the system's version."""
    with pytest.raises(UnsupportedPrecisionError, match="fp16"):
        resolve_torch_precision("bf16", "mps", APPLE)
