"""The names of the models on disk that can be served without a download."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from tests.hubs.conftest import HF_REPO, MS_REPO, spec
from tests.hubs.test_dependencies import LORA, adapter_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.management.cache_index import CacheView
    from emb_model_provider.settings import Settings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


def names(view: CacheView) -> list[tuple[str, str, str | None]]:
    return [(model.spec.alias, model.spec.source, model.spec.revision) for model in view.models]


def test_downloaded_models_have_the_ids_of_their_repositories(manager: ModelManager) -> None:
    """They are found by every spelling of a name, like served models."""
    manager.ensure(spec(HF_REPO))
    manager.ensure(spec(MS_REPO))
    view = manager.index.view()
    assert names(view) == [(HF_REPO, "huggingface", None), (MS_REPO, "modelscope", None)]
    for name in (HF_REPO, HF_REPO.upper(), f"{HF_REPO}:latest", f"openai/{HF_REPO}"):
        found = view.find(name)
        assert found is not None
        assert (found.spec.name, found.spec.trust_remote_code) == (HF_REPO, False)
    assert view.find("acme/nothing") is None


def test_revisions_have_names_of_their_own(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    """The id means the default branch; without a copy of it, the revision that was downloaded last."""
    huggingface.revisions = ("main", "v1", "v2")
    manager.ensure(spec(HF_REPO, revision="v1"))
    assert names(manager.index.view()) == [(HF_REPO, "huggingface", "v1")]
    manager.ensure(spec(HF_REPO, revision="v2"))
    assert names(manager.index.view()) == [(HF_REPO, "huggingface", "v2"), (f"{HF_REPO}@v1", "huggingface", "v1")]
    manager.ensure(spec(HF_REPO))
    aliases = [(alias, revision) for alias, _, revision in names(manager.index.view())]
    assert aliases == [(HF_REPO, None), (f"{HF_REPO}@v1", "v1"), (f"{HF_REPO}@v2", "v2")]


@pytest.mark.parametrize(("default", "chosen"), [("auto", "huggingface"), ("modelscope", "modelscope")])
def test_model_of_both_hubs_is_that_of_the_default_hub(
    default: str,
    chosen: str,
    configured: Callable[..., Settings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
) -> None:
    modelscope.repos[HF_REPO] = huggingface.repos[HF_REPO]
    manager = ModelManager(configured(model_source=default))
    manager.ensure(spec(HF_REPO, source="modelscope"))
    assert names(manager.index.view()) == [(HF_REPO, "modelscope", None)]
    manager.ensure(spec(HF_REPO, source="huggingface"))
    assert names(manager.index.view()) == [(HF_REPO, chosen, None)]


def test_other_name_on_a_hub(configured: Callable[..., Settings], modelscope: ModelScopeServer) -> None:
    """The id is the name for which the settings request it."""
    settings = configured(hub_names={"acme/ours": {"modelscope": MS_REPO}})
    manager = ModelManager(settings)
    manager.ensure(resolve_model(settings, "acme/ours", source="modelscope"))
    assert names(manager.index.view()) == [("acme/ours", "modelscope", None)]
    modelscope.forget()
    (model,) = manager.index.view().models
    manager.ensure(model.spec)
    assert modelscope.requests == []


def test_only_complete_repositories_are_servable(
    manager: ModelManager, huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    """No part of a repository, no directory, and no damaged model. A base model of an adapter need not be listed."""
    manager.ensure(spec(HF_REPO), exclude=["README.md"])
    directory = tmp_path / "model"
    shutil.copytree(manager.ensure(spec(HF_REPO), exclude=["README.md"]).path, directory)
    manager.ensure(spec(str(directory)))
    assert names(manager.index.view()) == []
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    adapter = manager.ensure(spec(LORA))
    view = manager.index.view()
    assert {model.spec.alias: model.is_dependency for model in view.models} == {LORA: False, HF_REPO: True}
    (adapter.path / "adapter_model.safetensors").unlink()
    manager.ensure(spec(MS_REPO))  # so that the index looks again
    assert {model.spec.alias for model in manager.index.view().models} == {HF_REPO, MS_REPO}


def test_disk_is_read_only_after_a_change(manager: ModelManager, tmp_path: Path) -> None:
    """A removal is noticed, too."""
    manager.ensure(spec(HF_REPO))
    for directory in (tmp_path / "cache" / "snapshots").iterdir():
        os.utime(directory, (1, 1))
    first = manager.index.view()
    assert manager.index.view() is first
    manager.remove(HF_REPO)
    assert names(manager.index.view()) == []


def test_interrupted_download_is_found_by_its_name(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    huggingface.faults.listed_too = ["vocab.txt"]
    with pytest.raises(Exception, match="Hugging Face"):
        manager.ensure(spec(HF_REPO))
    entry = manager.index.view().find_incomplete(HF_REPO)
    assert entry is not None
    assert (entry.in_use, manager.index.view().find(HF_REPO)) == (False, None)


@pytest.mark.parametrize(
    ("configured_precision", "compiled", "expected"),
    [("auto", ["int8"], "int8"), ("auto", ["fp32", "int8"], "auto"), ("fp16", ["int8"], "fp16"), ("auto", [], "auto")],
)
def test_model_is_served_at_the_precision_at_which_it_was_pulled(
    configured_precision: str, compiled: list[str], expected: str, configured: Callable[..., Settings], tmp_path: Path
) -> None:
    """Unless the settings say another one, or it was compiled for `auto`, too."""
    manager = ModelManager(configured(model_precision=configured_precision))
    snapshot = manager.ensure(spec(HF_REPO))
    for weights in compiled:
        write_artifact(tmp_path / "cache" / "artifacts" / weights, weights, snapshot.digest)
    (model,) = manager.index.view().models
    assert model.spec.precision == expected


def write_artifact(directory: Path, weights: str, snapshot: str) -> None:
    """Write the manifest of an artifact."""
    directory.mkdir(parents=True)
    files = [
        {"path": name, "size": 0, "sha256": "", "mtime_ns": 0} for name in ("model.xml", "model.bin", "tokenizer.json")
    ]
    content = {
        "recipe": {"snapshot": snapshot, "weights": weights}, "made_by": "a test", "files": files,
        "description": {"precision": weights, "fidelity": None},
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(content))
