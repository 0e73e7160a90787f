"""The file of models that are served again after a restart."""

from __future__ import annotations

import json
import logging
import multiprocessing
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.api.app import create_app
from emb_model_provider.errors import CacheNotWritableError
from emb_model_provider.management.kept_models import KeptModel, KeptModels
from emb_model_provider.settings import MappingEntry, Settings

if TYPE_CHECKING:
    from pathlib import Path

ONE = KeptModel(alias="one", model_name="acme/one", source="modelscope", revision="v1", precision="int8")
TWO = KeptModel(alias="two", model_name="acme/two", source="auto")


def test_models_are_added_replaced_and_removed(tmp_path: Path) -> None:
    kept = KeptModels(tmp_path / "cache")
    assert kept.read() == []
    kept.add(ONE)
    kept.add(TWO)
    kept.add(ONE.model_copy(update={"precision": "fp32"}))
    assert KeptModels(tmp_path / "cache").read() == [TWO, ONE.model_copy(update={"precision": "fp32"})]
    assert kept.aliases == {"one", "two"}
    assert [kept.remove("one"), kept.remove("one"), kept.remove("two")] == [True, False, True]
    assert not kept.path.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 2, "models": []}', '{"version": 1}', '{"version": 1, "models": 5}', "\0"]
)
def test_file_that_cannot_be_read_is_reported(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stops nothing. Before it is replaced, it is moved away."""
    kept = KeptModels(tmp_path)
    kept.path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert kept.read() == []
    assert str(kept.path) in caplog.text
    assert "load ID --keep" in caplog.text
    kept.add(ONE)
    assert kept.read() == [ONE]
    assert kept.path.with_suffix(".invalid").read_text() == content


def test_wrong_entry_does_not_affect_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptModels(tmp_path)
    wrong = [{"alias": "x"}, 5, {**ONE.model_dump(), "precision": "int3"}, {**ONE.model_dump(), "more": 1}]
    kept.path.write_text(json.dumps({"version": 1, "models": [*wrong, TWO.model_dump()]}))
    with caplog.at_level(logging.WARNING):
        assert kept.read() == [TWO]
    assert len(caplog.records) == len(wrong)
    assert "int3" in caplog.text


def test_cache_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheNotWritableError, match="EMB_PROVIDER_CACHE_DIR"):
        KeptModels(tmp_path / "file").add(ONE)


def add_many(directory: Path, name: str) -> None:
    for number in range(10):
        KeptModels(directory).add(KeptModel(alias=f"{name}-{number}", model_name="a/b", source="auto"))


def test_processes_lose_no_model(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=add_many, args=(tmp_path, name)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert len(KeptModels(tmp_path).read()) == 20


def test_service_serves_the_kept_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that it cannot serve are named: an alias of the settings, and a directory. Code of repositories never runs."""
    kept = KeptModels(tmp_path)
    for model in (ONE, KeptModel(alias="ours", model_name="acme/x", source="auto"),
                  KeptModel(alias="dir", model_name=str(tmp_path), source="auto")):  # fmt: skip
        kept.add(model)
    mapping = {"ours": MappingEntry(name="acme/ours")}
    settings = Settings.from_values(cache_dir=tmp_path, model_mapping=mapping, trust_remote_code=True)
    with caplog.at_level(logging.WARNING):
        services = create_app(settings, lambda: None).state.services
    served = {status.spec.alias: status for status in services.registry.statuses()}
    assert set(served) == {"ours", "one"}
    spec = served["one"].spec
    assert (spec.name, spec.source, spec.revision, spec.precision) == ("acme/one", "modelscope", "v1", "int8")
    assert (spec.trust_remote_code, served["one"].configured, served["one"].preload) == (False, False, False)
    assert [record.args[0] for record in caplog.records if record.args] == ["ours", "dir"]
