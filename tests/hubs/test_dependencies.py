"""Repositories that a model needs: the base models of adapters, and code in other repositories."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import (
    IncompleteRepositoryError,
    OfflineError,
    RepositoryNotFoundError,
    UnsupportedModelError,
)
from emb_model_provider.hubs.dependencies import required_repositories
from emb_model_provider.hubs.fetch import fetch_snapshot, manifest_key
from emb_model_provider.model_spec import BUNDLED_MODEL
from emb_model_provider.settings import TrustSettings
from emb_model_provider.snapshots import manifest
from tests.hubs.conftest import HF_REPO, MS_REPO, model_files, spec
from tests.hubs.helpers import write_files
from tests.models import snapshot_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

LORA = "acme/lora"
CODE = "acme/impl"
TRUST = TrustSettings(trust_remote_code=True, modelscope_trust_remote_code=True)
CODE_FILES = {
    "modeling_own.py": b"class Model: ...\n",
    "nested/configuration_own.py": b"class Config: ...\n",
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "README.md": b"# code\n",
}


def adapter_files(base: str | None, **config: Any) -> dict[str, bytes]:
    """Return a repository as PEFT writes it, for a base model."""
    content = {"peft_type": "LORA", "base_model_name_or_path": base, **config}
    return {
        "adapter_config.json": json.dumps(content).encode(),
        "adapter_model.safetensors": random.Random(3).randbytes(20_000),  # noqa: S311 - bytes that do not compress
        "README.md": b"# lora\n",
    }


def coded_files(reference: str = f"{CODE}--modeling_own.Model") -> dict[str, bytes]:
    """Return a model whose class is in another repository."""
    config = {"model_type": "own", "auto_map": {"AutoModel": reference}}
    return {**model_files(), "config.json": json.dumps(config).encode()}


# --- which repositories -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "needed"),
    [
        ("config.json", {"auto_map": {"AutoModel": "a/b--file.Class", "AutoConfig": "a/b--other.Class"}}, ["a/b"]),
        ("config.json", {"auto_map": {"AutoModel": "file.Class"}}, []),
        ("config.json", {"auto_map": {"AutoModel": "own/model--file.Class"}}, []),
        ("config.json", {"auto_map": {"AutoModel": "asked/name--file.Class"}}, []),
        ("config.json", {"auto_map": None}, []),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a/b--tok.Slow", None]}}, ["a/b"]),
        ("tokenizer_config.json", {"auto_map": ["a/b--tok.Slow", "c/d--tok.Fast"]}, ["a/b", "c/d"]),
        ("0_Transformer/config.json", {"auto_map": {"AutoModel": "a/b--file.Class"}}, ["a/b"]),
        ("modules.json", [{"type": "a/b--custom.Module"}, {"type": "custom.Other"}, "?"], ["a/b"]),
        ("modules.json", {"type": "a/b--custom.Module"}, []),
        ("other.json", {"auto_map": {"AutoModel": "a/b--file.Class"}}, []),
    ],
)
def test_repositories_of_code(tmp_path: Path, file: str, content: object, needed: list[str]) -> None:
    """They are needed only if the code may run. A reference to the own repository needs nothing."""
    write_files(tmp_path, {"model.safetensors": b"", file: json.dumps(content).encode()})
    snapshot = snapshot_of(tmp_path, repository="own/model")
    found = required_repositories(snapshot, "asked/name", with_code=True)
    assert [(each.name, each.kind, each.file) for each in found] == [(name, "code", file) for name in needed]
    assert required_repositories(snapshot, "asked/name", with_code=False) == []


@pytest.mark.parametrize("config", [b"[]", b"{", b'{"base_model_name_or_path": null}', b"{}"])
def test_adapter_without_the_name_of_a_base_model_is_refused(tmp_path: Path, config: bytes) -> None:
    write_files(tmp_path, {"adapter_config.json": config, "adapter_model.safetensors": b""})
    with pytest.raises((IncompleteRepositoryError, UnsupportedModelError), match=r"own/lora"):
        required_repositories(snapshot_of(tmp_path, repository="own/lora"), "own/lora", with_code=False)


def test_whole_model_with_an_adapter_needs_no_base_model(tmp_path: Path) -> None:
    write_files(tmp_path, {**model_files(), **adapter_files("a/b")})
    assert required_repositories(snapshot_of(tmp_path), "x", with_code=False) == []


# --- adapters -----------------------------------------------------------------------------------------


def test_base_model_of_an_adapter(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    """It is pinned and verified like any model, and later needs no request, also offline."""
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    snapshot = fetch_snapshot(spec(LORA), settings())
    base = snapshot.dependency(HF_REPO)
    assert base is not None
    assert (base.hub, base.repository, base.revision) == ("huggingface", HF_REPO, huggingface.commit(HF_REPO))
    assert "model.safetensors" in {file.path for file in base.files}
    assert snapshot.size > base.size
    huggingface.forget()
    assert fetch_snapshot(spec(LORA), settings()) == snapshot
    assert fetch_snapshot(spec(LORA), settings(offline=True)) == snapshot
    assert not huggingface.requests
    assert fetch_snapshot(spec(HF_REPO), settings()).digest == base.digest


def test_new_bytes_of_the_base_model_change_the_digest(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    first = fetch_snapshot(spec(LORA), settings())
    huggingface.repos[HF_REPO]["tokenizer.json"] = b'{"version": "2.0"}'
    assert fetch_snapshot(spec(LORA), settings()) == first
    second = fetch_snapshot(spec(LORA), settings(), force=True)
    assert second.files == first.files
    assert second.digest != first.digest


def test_base_model_has_its_revision(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    """The revision of the adapter is not that of its base model."""
    huggingface.revisions = ("main", "v2")
    huggingface.repos[LORA] = adapter_files(HF_REPO, revision="v2")
    fetch_snapshot(spec(LORA, revision="main"), settings())
    assert huggingface.asked("acme/tiny/revision/v2") == 1
    assert not huggingface.asked("acme/tiny/revision/main")


def test_base_model_comes_from_the_hub_of_the_adapter(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer
) -> None:
    """With the fallback and the names of the hubs, like any model."""
    modelscope.repos["iic/lora"] = adapter_files("acme/model")
    with pytest.raises(
        RepositoryNotFoundError, match=r"iic/lora needs the base model from acme/model .*ModelScope has no"
    ):
        fetch_snapshot(spec("iic/lora"), settings())
    assert not huggingface.requests
    names = {"acme/model": {"huggingface": HF_REPO}}
    config = settings(modelscope_fallback_to_huggingface=True, hub_names=names)
    base = fetch_snapshot(spec("iic/lora"), config).dependency("acme/model")
    assert base is not None
    assert (base.hub, base.repository) == ("huggingface", HF_REPO)


def test_bundled_model_as_base_model(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    huggingface.repos[LORA] = adapter_files(BUNDLED_MODEL)
    base = fetch_snapshot(spec(LORA), settings()).dependency(BUNDLED_MODEL)
    assert base is not None
    assert base.hub == "bundled"


@pytest.mark.parametrize("name", ["{tmp}/base", "../base", "base"])
def test_adapter_and_base_model_in_directories(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, tmp_path: Path, name: str
) -> None:
    """The name is an absolute path, or relative to the directory of the adapter."""
    name = name.format(tmp=tmp_path)
    base = tmp_path / "lora" / "base" if name == "base" else tmp_path / "base"
    write_files(base, model_files())
    write_files(tmp_path / "lora", adapter_files(name))
    snapshot = fetch_snapshot(spec("x", path=tmp_path / "lora"), settings())
    found = snapshot.dependency(name)
    assert found is not None
    assert (found.hub, found.path.resolve()) == ("local", base)
    assert not huggingface.requests


@pytest.mark.parametrize(
    ("name", "hub"), [(HF_REPO, "huggingface"), (MS_REPO, "modelscope"), (BUNDLED_MODEL, "bundled")]
)
def test_adapter_in_a_directory_with_a_base_model_from_a_hub(
    settings: Callable[..., HubSettings], tmp_path: Path, name: str, hub: str
) -> None:
    """The hub is chosen by the name, as for any model."""
    write_files(tmp_path / "lora", adapter_files(name))
    base = fetch_snapshot(spec("x", path=tmp_path / "lora"), settings()).dependency(name)
    assert base is not None
    assert base.hub == hub


def test_adapter_of_a_hub_reads_no_directory(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither by a path, nor by a name that a directory here has, too."""
    write_files(tmp_path / HF_REPO, model_files())
    monkeypatch.chdir(tmp_path)
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    base = fetch_snapshot(spec(LORA), settings()).dependency(HF_REPO)
    assert base is not None
    assert base.hub == "huggingface"
    huggingface.repos[LORA] = adapter_files(str(tmp_path / HF_REPO))
    with pytest.raises(UnsupportedModelError, match=r"a path on the machine where it was trained"):
        fetch_snapshot(spec(LORA), settings(), force=True)


def test_missing_directory_of_a_base_model_is_named(settings: Callable[..., HubSettings], tmp_path: Path) -> None:
    write_files(tmp_path / "lora", adapter_files("/nowhere/base"))
    with pytest.raises(
        IncompleteRepositoryError, match=r"'/nowhere/base' \(adapter_config.json\), which does not exist"
    ):
        fetch_snapshot(spec("x", path=tmp_path / "lora"), settings())


@pytest.mark.parametrize("base", ["acme/other", LORA])
def test_adapter_of_an_adapter_is_refused(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, base: str
) -> None:
    """Also one that names itself, or two that name each other."""
    huggingface.repos |= {LORA: adapter_files(base), "acme/other": adapter_files(LORA)}
    with pytest.raises(UnsupportedModelError, match=rf"{LORA} is {base}, which is an adapter itself"):
        fetch_snapshot(spec(LORA), settings())


def test_base_model_without_weights_is_refused(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """An export of the base model cannot be adapted."""
    huggingface.repos[LORA] = adapter_files("acme/onnx")
    huggingface.repos["acme/onnx"] = {"config.json": b"{}", "tf_model.h5": b""}
    with pytest.raises(IncompleteRepositoryError, match=r"needs the base model from acme/onnx .*TensorFlow"):
        fetch_snapshot(spec(LORA), settings())
    huggingface.repos["acme/onnx"]["model.onnx"] = b"onnx"
    with pytest.raises(UnsupportedModelError, match=r"only an export \(model\.onnx\)"):
        fetch_snapshot(spec(LORA), settings())


def test_offline_needs_the_base_model(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    fetch_snapshot(spec(LORA), settings())
    for path in (settings().cache_dir / "snapshots" / "huggingface").glob("acme--tiny*.json"):
        path.unlink()
    (tmp_path / "hf" / "models--acme--tiny").rename(tmp_path / "elsewhere")
    with pytest.raises(OfflineError, match=r"acme/lora needs the base model from acme/tiny"):
        fetch_snapshot(spec(LORA), settings(offline=True))


def test_download_with_patterns_has_no_dependencies(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    patterns = manifest.FilePatterns(("*.json",))
    assert fetch_snapshot(spec(LORA), settings(), patterns=patterns).dependencies == ()


# --- code ---------------------------------------------------------------------------------------------


def test_code_of_another_repository(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    """Only code and configurations are downloaded, and only if the code may run."""
    huggingface.repos |= {HF_REPO: coded_files(), CODE: CODE_FILES}
    plain = fetch_snapshot(spec(HF_REPO), settings())
    assert plain.dependencies == ()
    assert not huggingface.asked("modeling_own.py")
    snapshot = fetch_snapshot(spec(HF_REPO), settings(), trust=TRUST)
    code = snapshot.dependency(CODE)
    assert code is not None
    assert [file.path for file in code.files] == ["config.json", "modeling_own.py", "nested/configuration_own.py"]
    assert code.revision == huggingface.commit(CODE)
    assert snapshot.digest != plain.digest
    huggingface.forget()
    assert fetch_snapshot(spec(HF_REPO), settings(offline=True), trust=TRUST) == snapshot
    assert fetch_snapshot(spec(HF_REPO, trust_remote_code=False), settings(), trust=TRUST) == plain
    assert not huggingface.requests


def test_code_from_modelscope(settings: Callable[..., HubSettings], modelscope: ModelScopeServer) -> None:
    modelscope.repos |= {MS_REPO: coded_files(), CODE: CODE_FILES}
    snapshot = fetch_snapshot(spec(MS_REPO), settings(), trust=TrustSettings(modelscope_trust_remote_code=True))
    code = snapshot.dependency(CODE)
    assert code is not None
    assert (code.hub, code.path.name) == ("modelscope", "master")


def test_code_from_a_hub_that_is_not_trusted_is_left_out(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer
) -> None:
    """Trust in ModelScope does not extend to the hub of the fallback."""
    modelscope.repos[MS_REPO] = coded_files()
    huggingface.repos[CODE] = CODE_FILES
    config = settings(modelscope_fallback_to_huggingface=True)
    only_modelscope = TrustSettings(modelscope_trust_remote_code=True)
    assert fetch_snapshot(spec(MS_REPO), config, trust=only_modelscope).dependencies == ()
    assert fetch_snapshot(spec(MS_REPO), config, trust=TRUST).dependency(CODE) is not None


def test_adapter_whose_base_model_needs_code(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """The code is a dependency of the base model."""
    huggingface.repos |= {LORA: adapter_files(HF_REPO), HF_REPO: coded_files(), CODE: CODE_FILES}
    snapshot = fetch_snapshot(spec(LORA), settings(), trust=TRUST)
    base = snapshot.dependency(HF_REPO)
    assert base is not None
    assert base.dependency(CODE) is not None
    key = manifest_key("huggingface", spec(LORA), settings())
    found = manifest.load(key, settings().cache_dir / "snapshots")
    assert found is not None
    assert manifest.compose(found, settings().cache_dir / "snapshots") == snapshot
    assert found.digests == {snapshot.digest, snapshot.with_dependencies({}).digest}


@pytest.mark.parametrize("reference", ["../../etc--file.Class", "http://evil/x--file.Class"])
def test_invalid_names_are_rejected_without_a_request(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, reference: str
) -> None:
    huggingface.repos[HF_REPO] = coded_files(reference)
    fetch_snapshot(spec(HF_REPO), settings())
    huggingface.forget()
    with pytest.raises(RepositoryNotFoundError, match=r"needs code from .* nor a repository id"):
        fetch_snapshot(spec(HF_REPO), settings(), trust=TRUST)
    assert not huggingface.requests
