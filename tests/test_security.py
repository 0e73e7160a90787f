"""Malicious repositories, names and settings; see docs/security.md. Malicious clients are tested in tests/api."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from emb_model_provider.artifacts.compiler_process import CompileJob, run_compiler
from emb_model_provider.artifacts.recipe import recipe_for
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.errors import HubError, LoadError, SettingsError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.progress import CancelToken, ignore_progress
from emb_model_provider.settings import HubSettings, Settings
from emb_model_provider.settings.loading import load_settings
from emb_model_provider.snapshots.manifest import ManifestKey
from tests.backends.small_tokenizers import wordpiece
from tests.models import bert, save_modelscope, save_st, snapshot_of, spec_of
from tests.service import COMMAND, environment, free_port

if TYPE_CHECKING:
    from collections.abc import Callable

# --- secrets ------------------------------------------------------------------------------------------

SECRETS = {name: f"hush-{name.lower()}" for name in ("API_KEYS", "ADMIN_API_KEYS", "HF_TOKEN", "MODELSCOPE_TOKEN")}
MAPPING = {"a": {"name": "owner/model", "token": "hush-mapping"}}


def load(**variables: str) -> Settings:
    named = {f"EMB_PROVIDER_{name}": value for name, value in variables.items()}
    return load_settings(Path("/no/such/file"), named)[0]


def test_settings_do_not_show_secrets() -> None:
    """Printed, dumped and formatted settings, groups and models contain no key or token."""
    settings = load(MODEL_MAPPING=json.dumps(MAPPING), **SECRETS)
    served = settings.served_models()
    groups = [getattr(settings, name) for name in type(settings).model_fields]
    forms = [settings.model_dump_json(), str(settings.model_dump()), str(settings.model_dump(mode="json"))]
    for shown in (settings, *groups, served, served.specs[0]):
        forms += [repr(shown), str(shown), f"{shown}", f"{shown!s:.9999}"]
    assert settings.server.accepted_admin_keys == (SECRETS["ADMIN_API_KEYS"],)
    assert served.specs[0].token == "hush-mapping"
    assert len(forms) > 40
    assert [form for form in forms if "hush" in form] == []


@pytest.mark.parametrize(
    "invalid",
    [
        {"PORT": "x"},
        {"API_KEY": "hush-misspelt"},
        {"MODEL_MAPPING": '{"a": {"name": "x", "token": "hush-mapping",}}'},
        {"MODEL_MAPPING": '{"a": {"name": "x", "token": ["hush-mapping"]}}'},
        {"MODEL_MAPPING": '{"a": {"name": "x", "tokn": "hush-mapping"}}'},
        {"MODEL_MAPPING": '{"a": {"name": 5, "token": "hush-mapping"}}'},
        {"MAX_BODY_MB": "2", "MAX_PENDING_BODY_MB": "1"},
    ],
    ids=str,
)
def test_errors_of_settings_do_not_show_secrets(invalid: dict[str, str]) -> None:
    """The message for an invalid setting contains no secret, even if the secret itself is invalid."""
    named = {f"EMB_PROVIDER_{name}": value for name, value in {**SECRETS, **invalid}.items()}
    try:
        _, warnings = load_settings(Path("/no/such/file"), named)
        message = "\n".join(warnings)
    except SettingsError as error:
        message = str(error)
    assert message
    assert "hush" not in message


# --- names --------------------------------------------------------------------------------------------

NAMES = ["../../../etc/passwd", "..", "/etc/passwd", "a/../../b", "..\\..\\b", "a\0b", "C:\\x", "模型/../x", "-" * 300, "~root/x", "%2e%2e%2fx"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_manifests_stay_in_the_cache(name: str, tmp_path: Path) -> None:
    """Manifests and locks have safe file names, whatever the model and the revision are called."""
    root = tmp_path / "cache" / "snapshots"
    for key in (ManifestKey("huggingface", name, name, name), ManifestKey("local", name)):
        for path in (key.manifest_path(root), key.lock_path(root)):
            assert path.parent == root / key.hub
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,120}", path.name)
            assert path.resolve().is_relative_to(root.resolve())
    assert ManifestKey("huggingface", name).stem != ManifestKey("huggingface", f"{name} ").stem


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("name", ["../../../etc/passwd", "..", "a/../../b", "..\\..\\b", "a\0b", "%2e%2e%2fx"], ids=ascii)  # fmt: skip
def test_invalid_repository_ids_are_rejected(name: str, source: str, tmp_path: Path) -> None:
    """A configured name that is not a repository id is rejected before any file is written or request sent."""
    settings = HubSettings(cache_dir=tmp_path / "cache", modelscope_cache_dir=tmp_path / "m", hf_cache_dir=tmp_path / "h")  # fmt: skip
    with pytest.raises(HubError, match="nor a repository id"):
        fetch_snapshot(spec_of(name=name, source=source), settings)
    with pytest.raises(HubError, match="not a valid branch, tag or commit"):
        fetch_snapshot(spec_of(name="a/b", source=source, revision=name), settings)
    assert list(tmp_path.iterdir()) == []


def test_artifact_is_named_by_a_hash(tmp_path: Path) -> None:
    """The directory of an artifact contains no name of a model or revision."""
    snapshot = snapshot_of(save_st(tmp_path / "model", bert, wordpiece()), repository="../../x")
    spec = spec_of(alias="../../x", name="../../x", revision="../../x")
    recipe = recipe_for(spec, snapshot, trust_remote_code=False, native_bf16=False)
    assert re.fullmatch(r"[0-9a-f]{64}", recipe.key)


# --- pickles ------------------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


def as_pickle(payload: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


def as_torch_file(payload: object, path: Path) -> None:
    torch.save({"embeddings.word_embeddings.weight": payload}, path)


def as_old_torch_file(payload: object, path: Path) -> None:
    torch.save({"linear.weight": payload}, path, _use_new_zipfile_serialization=False)


WRITERS = [as_pickle, as_torch_file, as_old_torch_file]


@pytest.mark.parametrize("write", WRITERS)
def test_payload_would_run(write: Callable[[object, Path], None], tmp_path: Path) -> None:
    """The payload of these tests runs when the file is unpickled without protection."""
    file = tmp_path / "file"
    write(Payload(tmp_path / "ran"), file)
    if write is as_pickle:
        pickle.loads(file.read_bytes())  # noqa: S301 - the purpose of this test
    else:
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("part", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_code_in_weights_is_not_run(part: str, write: Callable[[object, Path], None], tmp_path: Path) -> None:
    """Weights of the transformer or of a later module that contain code are rejected, and the code does not run."""
    directory = save_st(tmp_path / "model", bert, wordpiece(), dense=20)
    (directory / part).with_name("model.safetensors").unlink()
    write(Payload(tmp_path / "ran"), directory / part)
    with pytest.raises(LoadError):
        TorchBackend(spec_of(), snapshot_of(directory), trust_remote_code=False)
    assert not (tmp_path / "ran").exists()


def test_tensors_are_loaded(tmp_path: Path) -> None:
    """`.bin` files that contain only tensors are supported in every part of a model."""
    from safetensors.torch import load_file

    directory = save_st(tmp_path / "model", bert, wordpiece(), dense=20)
    for part in (directory, directory / "2_Dense"):
        torch.save(load_file(part / "model.safetensors"), part / "pytorch_model.bin")
        (part / "model.safetensors").unlink()
    backend = TorchBackend(spec_of(), snapshot_of(directory), trust_remote_code=False)
    assert backend.description.dimension == 20


@pytest.mark.slow
def test_service_does_not_run_code_in_weights(tmp_path: Path) -> None:
    """Neither the compiler nor torch, which is tried after it, runs code in weights.

    This also holds for a trusted repository, about which the log warns.
    """
    directory = save_modelscope(tmp_path / "model", None)
    as_torch_file(Payload(tmp_path / "ran"), directory / "pytorch_model.bin")
    settings = {"PORT": str(free_port()), "MODEL_PATH": str(directory), "TRUST_REMOTE_CODE": "true"}
    process = subprocess.run(
        COMMAND,
        cwd=tmp_path,
        env=environment(tmp_path, **settings),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [json.loads(line) for line in process.stderr.splitlines()]
    assert process.returncode == 1
    assert not (tmp_path / "ran").exists()
    assert any("compiling" in line["message"] for line in lines), "the compiler did not run"
    assert any(line["level"] == "ERROR" and "model" in line["message"] for line in lines)
    assert "Traceback" not in process.stderr
    warnings = [line["message"] for line in lines if line["level"] == "WARNING"]
    assert any("trust_remote_code" in message for message in warnings)


# --- code of repositories -----------------------------------------------------------------------------


def test_code_of_repositories_is_not_trusted_by_default() -> None:
    """No code of any hub runs by default. Each switch applies to its own hubs, and a model's own setting takes precedence."""
    default, spec = load().trust, spec_of()
    assert not any(default.allows(spec, hub) for hub in ("huggingface", "modelscope", "local", "bundled"))
    only_modelscope = load(MODELSCOPE_TRUST_REMOTE_CODE="true").trust
    assert only_modelscope.allows(spec, "modelscope")
    assert not only_modelscope.allows(spec, "huggingface")
    assert not load(TRUST_REMOTE_CODE="true").trust.allows(spec, "modelscope")
    assert not only_modelscope.allows(spec_of(trust_remote_code=False), "modelscope")


def test_compiler_gets_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process that may run code of a repository has no key, no token and no hub in its environment."""
    names = [f"EMB_PROVIDER_{name}" for name in SECRETS] + ["HF_TOKEN", "MODELSCOPE_API_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"]  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "hush")
    program = "import json, os; print(json.dumps({'outcome': 'unable', 'reason': json.dumps(dict(os.environ))}))"
    monkeypatch.setattr("emb_model_provider.artifacts.compiler_process.COMMAND", (sys.executable, "-c", program))
    spec, snapshot = spec_of(token="hush"), snapshot_of(save_st(tmp_path / "model", bert, wordpiece()))
    recipe = recipe_for(spec, snapshot, trust_remote_code=True, native_bf16=False)
    job = CompileJob(spec=spec, snapshot=snapshot, recipe=recipe, directory=tmp_path, threads=1)
    variables = json.loads(run_compiler(job, ignore_progress, CancelToken()).reason)
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert "hush" not in variables.values()
    assert "hush" not in job.to_json()


# --- the document -------------------------------------------------------------------------------------


def test_each_defense_has_a_test() -> None:
    """The tests that docs/security.md names for its defenses exist."""
    root = Path(__file__).parent
    text = (root.parent / "docs" / "security.md").read_text(encoding="utf-8")
    section = text.partition("## Threats and defenses")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    named = [re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]) for row in rows[1:]]
    assert len(named) > 15
    assert all(named), "a defense without a test"
    files = {file.stem for file in root.rglob("test_*.py")}
    assert {name for names in named for name in names} <= files
