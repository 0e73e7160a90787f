"""The cache stays within its bounds, and the right backend is chosen."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.artifacts import prepare
from emb_model_provider.artifacts import recipe as recipes
from emb_model_provider.errors import CacheNotWritableError, LoadError

if TYPE_CHECKING:
    from tests.compile.service import Service

# --- the cache ------------------------------------------------------------------------------------------------


def test_the_cache_is_bounded(service: Service) -> None:
    """The artifact that was used longest ago goes; the one in use stays, however old."""
    held = service.prepare(max_length=40).load()
    service.prepare(max_length=41)
    size = sum(path.stat().st_size for path in service.artifacts[0].iterdir())
    service.max_bytes = int(2.5 * size)
    oldest_use = 10**9
    for place in service.artifacts:
        os.utime(place, ns=(oldest_use, oldest_use))
    service.prepare(max_length=42)
    service.prepare(max_length=43)
    assert len(service.artifacts) == 2
    starts = service.starts
    service.prepare(max_length=40)
    assert service.starts == starts
    held.close()
    for place in service.artifacts:
        os.utime(place, ns=(oldest_use, oldest_use))
    service.prepare(max_length=44)
    service.prepare(max_length=45)
    service.prepare(max_length=40)
    assert service.starts == starts + 3


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="permissions do not bind root")
def test_a_cache_that_cannot_be_written(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact in it is used; without one, torch serves, or openvino is refused, naming the setting."""

    def refuse(*_: object) -> None:
        raise CacheNotWritableError("Cannot write: set EMB_PROVIDER_CACHE_DIR")

    service.prepare()
    monkeypatch.setattr("emb_model_provider.artifacts.store.require_writable", refuse)
    for path in (service.cache / "artifacts").glob("*.hold"):
        path.unlink()
    (service.cache / "artifacts").chmod(0o555)
    try:
        assert service.prepare().load().description.backend == "openvino"
        assert "EMB_PROVIDER_CACHE_DIR" in service.prepare(max_length=9).notes[0]
        with pytest.raises(CacheNotWritableError, match="EMB_PROVIDER_CACHE_DIR"):
            service.prepare(max_length=9, backend="openvino")
    finally:
        (service.cache / "artifacts").chmod(0o755)
    assert service.starts == 1


def test_an_image_needs_neither_torch_nor_the_same_processor(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the tools are not installed, an artifact made elsewhere, perhaps without bf16, is used."""
    monkeypatch.setattr(prepare, "native_bf16", lambda: False)
    service.prepare()
    tools = recipes.TOOL_PACKAGES
    real = recipes.installed_version
    for module in (recipes, prepare):
        monkeypatch.setattr(module, "installed_version", lambda name: None if name in tools else real(name))
    monkeypatch.setattr(prepare, "native_bf16", lambda: True)
    assert service.prepare().load().description.precision == "fp32"
    with pytest.raises(LoadError, match="compiling needs torch"):
        service.prepare(max_length=9, backend="openvino")
    assert service.starts == 1


# --- choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "device", "cuda", "expected"),
    [
        ("auto", "auto", False, "openvino"),
        ("auto", "cpu", True, "openvino"),
        ("openvino", "auto", True, "openvino"),
        ("torch", "cpu", False, "torch"),
    ],
)
def test_the_backend_by_device(
    asked: str, device: str, cuda: bool, expected: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto is openvino on a CPU; whoever names a backend gets it."""
    monkeypatch.setattr(prepare, "has_cuda", lambda: cuda)
    assert service.prepare(backend=asked, device=device).load().description.backend == expected


def test_auto_with_a_cuda_device_is_torch(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled for a device that torch serves."""
    monkeypatch.setattr(prepare, "has_cuda", lambda: True)
    service.prepare(device="auto")
    service.prepare(device="cuda")
    assert service.starts == 0


def test_openvino_on_a_gpu_is_refused(service: Service) -> None:
    """The message names both settings."""
    with pytest.raises(LoadError, match=r"EMB_PROVIDER_BACKEND=openvino.*EMB_PROVIDER_DEVICE=cuda:0"):
        service.prepare(backend="openvino", device="cuda:0")


@pytest.mark.parametrize(
    ("precision", "words"), [("fp16", "weights are stored at half"), ("bf16", "no bf16")]
)
def test_a_precision_that_is_not_computed_in_is_explained(
    precision: str, words: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description says what is computed in, and a note why."""
    monkeypatch.setattr(prepare, "native_bf16", lambda: False)
    description = service.prepare(precision=precision).load().description
    assert description.precision == "fp32"
    assert any(words in note for note in description.notes)
