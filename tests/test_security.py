"""What a repository, a name or a wrong setting must not be able to do; see docs/security.md.

What a client must not be able to do is in tests/api: test_access, test_admin, test_secrets, test_slow_clients.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from emb_model_provider.artifacts.compile_job import Job
from emb_model_provider.artifacts.compiler_process import run_child
from emb_model_provider.artifacts.recipe import recipe_for
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.errors import LoadError, SettingsError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.settings import HubSettings, Settings
from emb_model_provider.settings.loading import load_settings
from emb_model_provider.snapshots.manifest import ManifestKey
from tests.backends.small_tokenizers import wordpiece
from tests.models import bert, save_modelscope, save_st, snapshot_of, spec_of
from tests.service import COMMAND, environment, free_port

if TYPE_CHECKING:
    from collections.abc import Callable

# --- secrets ------------------------------------------------------------------------------------------

SECRETS = {
    name: f"hush-{name.lower()}" for name in ("API_KEYS", "ADMIN_API_KEYS", "HF_TOKEN", "MODELSCOPE_TOKEN")
}
MAPPING = {"a": {"name": "owner/model", "token": "hush-mapping"}}


def load(**variables: str) -> Settings:
    named = {f"EMB_PROVIDER_{name}": value for name, value in variables.items()}
    return load_settings(Path("/no/such/file"), named)[0]


def test_no_form_of_the_settings_shows_a_secret() -> None:
    """Printing, dumping or formatting settings, their groups or the models in them gives no key or token away."""
    settings = load(MODEL_MAPPING=json.dumps(MAPPING), **SECRETS)
    groups: list[Any] = [
        settings.server,
        settings.hubs,
        settings.served_models(),
        settings.served_models().specs[0],
    ]
    groups += [settings.limits, settings.logs, settings.lifecycle, settings.trust]
    forms: list[str] = [settings.model_dump_json(), str(settings.model_dump()), str(settings.model_dump(mode="json"))]  # fmt: skip
    for each in (settings, *groups):
        forms += [repr(each), str(each), f"{each}", f"{each!s:.9999}"]
    assert settings.server.admin_api_keys == (SECRETS["ADMIN_API_KEYS"],)
    assert settings.served_models().specs[0].token == "hush-mapping"
    assert [form for form in forms if "hush" in form] == []


@pytest.mark.parametrize(
    "wrong",
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
def test_line_about_a_wrong_setting_shows_no_secret(wrong: dict[str, str]) -> None:
    """Whatever else is wrong, or is wrong with a secret itself."""
    named = {f"EMB_PROVIDER_{name}": value for name, value in {**SECRETS, **wrong}.items()}
    try:
        _, warnings = load_settings(Path("/no/such/file"), named)
        said = "\n".join(warnings)
    except SettingsError as error:
        said = str(error)
    assert said
    assert "hush" not in said


# --- names --------------------------------------------------------------------------------------------

NAMES = ["../../../etc/passwd", "..", "/etc/passwd", "a/../../b", "..\\..\\b", "a\0b", "C:\\x", "模型/../x", "-" * 300, "~root/x", "%2e%2e%2fx"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_what_is_kept_of_a_model_stays_in_the_cache(name: str, tmp_path: Path) -> None:
    """Manifests and locks have names of their own making, whatever model and revision they are for."""
    root = tmp_path / "cache" / "snapshots"
    for question in (ManifestKey("huggingface", name, name, name), ManifestKey("local", name)):
        for path in (question.manifest_path(root), question.lock_path(root)):
            assert path.parent == root / question.hub
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,120}", path.name)
            assert path.resolve().is_relative_to(root.resolve())
    assert ManifestKey("huggingface", name).stem != ManifestKey("huggingface", f"{name} ").stem


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("name", ["../../../etc/passwd", "..", "a/../../b", "..\\..\\b", "a\0b", "%2e%2e%2fx"], ids=ascii)  # fmt: skip
def test_hub_is_not_asked_for_a_path(name: str, source: str, tmp_path: Path) -> None:
    """A configured name that is no repository's is refused before anything is written or asked."""
    settings = HubSettings(cache_dir=tmp_path / "cache", modelscope_cache_dir=tmp_path / "m", hf_cache_dir=tmp_path / "h")  # fmt: skip
    with pytest.raises(Exception, match=r"Check EMB_PROVIDER_MODEL_"):
        fetch_snapshot(spec_of(name=name, source=source), settings)
    with pytest.raises(Exception, match=r"Check EMB_PROVIDER_MODEL_"):
        fetch_snapshot(spec_of(name="a/b", source=source, revision=name), settings)
    assert list(tmp_path.iterdir()) == []


def test_artifact_is_named_by_a_hash(tmp_path: Path) -> None:
    """No name that anybody chose is part of where a compiled model is kept."""
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
    """The files of these tests do harm to whoever unpickles them."""
    file = tmp_path / "file"
    write(Payload(tmp_path / "ran"), file)
    if write is as_pickle:
        pickle.loads(file.read_bytes())  # noqa: S301 - that is what this shows
    else:
        torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("part", ["pytorch_model.bin", "2_Dense/pytorch_model.bin"])
def test_no_part_of_a_model_is_unpickled(
    part: str, write: Callable[[object, Path], None], tmp_path: Path
) -> None:
    """Weights of the transformer or of a later module that carry code are refused, and the code does not run."""
    directory = save_st(tmp_path / "model", bert, wordpiece(), dense=20)
    (directory / part).with_name("model.safetensors").unlink()
    write(Payload(tmp_path / "ran"), directory / part)
    with pytest.raises(LoadError):
        TorchBackend(spec_of(), snapshot_of(directory), trust_remote_code=False)
    assert not (tmp_path / "ran").exists()


def test_tensors_alone_are_loaded(tmp_path: Path) -> None:
    """`.bin` files of tensors, in every part of a model, go on working."""
    from safetensors.torch import load_file

    directory = save_st(tmp_path / "model", bert, wordpiece(), dense=20)
    for part in (directory, directory / "2_Dense"):
        torch.save(load_file(part / "model.safetensors"), part / "pytorch_model.bin")
        (part / "model.safetensors").unlink()
    backend = TorchBackend(spec_of(), snapshot_of(directory), trust_remote_code=False)
    assert backend.description.dimension == 20


def test_service_unpickles_nothing(tmp_path: Path) -> None:
    """Neither the compiling child nor torch, which is tried after it, runs what weights carry; one line says why.

    Not even where the repository's own code is trusted, which the log warns about.
    """
    directory = save_modelscope(tmp_path / "model", None)
    as_torch_file(Payload(tmp_path / "ran"), directory / "pytorch_model.bin")
    settings = {"PORT": str(free_port()), "MODEL_PATH": str(directory), "TRUST_REMOTE_CODE": "true"}
    ended = subprocess.run(
        COMMAND,
        cwd=tmp_path,
        env=environment(tmp_path, **settings),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    messages = [line["message"] for line in lines]
    assert ended.returncode == 1
    assert not (tmp_path / "ran").exists()
    assert any("compiling" in message for message in messages), "the child was not asked"
    assert [message for message in messages if message.startswith("model model could not be loaded: ")]
    assert "Traceback" not in ended.stderr
    warned = [line["message"] for line in lines if line["level"] == "WARNING"]
    assert any("trust_remote_code is on: code from" in message for message in warned)


# --- code of repositories -----------------------------------------------------------------------------


def test_code_of_repositories_is_off_unless_asked_for() -> None:
    """No hub's code runs by default, each switch is for its own hubs, and a model's own word wins."""
    default, spec = load().trust(), spec_of()
    assert not any(default.allows(spec, hub) for hub in ("huggingface", "modelscope", "local", "bundled"))
    only_modelscope = load(MODELSCOPE_TRUST_REMOTE_CODE="true").trust()
    assert only_modelscope.allows(spec, "modelscope")
    assert not only_modelscope.allows(spec, "huggingface")
    assert not load(TRUST_REMOTE_CODE="true").trust().allows(spec, "modelscope")
    assert not only_modelscope.allows(spec_of(trust_remote_code=False), "modelscope")


def test_compiling_child_is_told_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process that may run a repository's code has no key, no token, and no hub in its environment."""
    names = [f"EMB_PROVIDER_{name}" for name in SECRETS] + ["HF_TOKEN", "MODELSCOPE_API_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"]  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "hush")
    report = (
        "import json, os; print(json.dumps({'outcome': 'unable', 'reason': json.dumps(dict(os.environ))}))"
    )
    monkeypatch.setattr(
        "emb_model_provider.artifacts.compiler_process.COMMAND", (sys.executable, "-c", report)
    )
    spec, snapshot = spec_of(token="hush"), snapshot_of(save_st(tmp_path / "model", bert, wordpiece()))
    recipe = recipe_for(spec, snapshot, trust_remote_code=True, native_bf16=False)
    job = Job(spec=spec, snapshot=snapshot, recipe=recipe, directory=tmp_path, threads=1, parent=os.getpid())
    seen = json.loads(run_child(job, stopped=lambda: False).reason)
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert "hush" not in seen.values()
    assert "hush" not in job.to_json()


# --- the document -------------------------------------------------------------------------------------


def test_tests_that_the_threat_model_names_exist() -> None:
    """Each defence in docs/security.md is held by a test that is there."""
    root = Path(__file__).parent
    text = (root.parent / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("## What is defended")[2].splitlines() if line.startswith("| ")]
    named = [re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]) for row in rows[1:]]
    assert len(named) > 15
    assert all(named), "a defence without a test"
    files = {file.stem for file in root.rglob("test_*.py")}
    assert {name for names in named for name in names} <= files
