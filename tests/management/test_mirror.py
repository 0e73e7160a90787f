"""Mirrors: written, updated, refused, loaded and verified, with the real clients and local servers of two hubs."""

from __future__ import annotations

import json
import resource
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import (
    CorruptSnapshotError,
    HubError,
    IncompleteRepositoryError,
    ModelInUseError,
    NotAllowedError,
    NotCachedError,
    OperationCancelledError,
)
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.model_spec import BUNDLED_MODEL, MIRROR_MANIFEST
from emb_model_provider.progress import CancelToken, Progress
from emb_model_provider.snapshots import mirror
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files, modelscope_files
from tests.hubs.helpers import write_files
from tests.hubs.test_dependencies import CODE, CODE_FILES, LORA, adapter_files, coded_files
from tests.management.helpers import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.snapshot import Snapshot
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

BASE = f".dependencies/{HF_REPO.replace('/', '--')}"


@pytest.fixture
def write(configured: Callable[..., Settings], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that mirrors a model to `tmp_path / "usb"`."""

    def write(name: str = HF_REPO, *, force: bool = False, **settings: object) -> Path:
        found = configured(**settings)
        mirrored, _ = ModelManager(found).mirror(resolve_model(found, name), tmp_path / "usb", force=force)
        return mirrored.snapshot.path

    return write


@pytest.fixture
def closed(tmp_path: Path) -> Callable[..., Settings]:
    """Return a function that makes the settings of a machine without a hub and with empty caches."""
    from emb_model_provider.settings import Settings

    def make(**changes: object) -> Settings:
        unreachable = {"hf_endpoint": "http://127.0.0.1:9", "modelscope_endpoint": "http://127.0.0.1:9"}
        return Settings.from_values(**{"cache_dir": tmp_path / "closed", **unreachable, **changes})

    return make


def load(settings: Settings, directory: Path) -> Snapshot:
    snapshot, lock = ModelManager(settings).acquire(resolve_model(settings, str(directory)))
    with lock:
        return snapshot


def names_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def findings(settings: Settings, directory: Path) -> list[tuple[str, str]]:
    manager = ModelManager(settings)
    (model,) = manager.find(str(directory), directories=True)
    result = manager.verify(model)
    assert result.ok == (not result.findings)
    return [(finding.path, finding.problem) for finding in result.findings]


# --- what a mirror contains ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [HF_REPO, MS_REPO, BUNDLED_MODEL])
def test_mirror_is_loaded_without_a_hub(
    name: str, write: Callable[..., Path], closed: Callable[..., Settings], configured: Callable[..., Settings]
) -> None:
    """It has the hub, the name, the commit and the digest of the original, wherever it is copied to."""
    usb = write(name)
    original = ModelManager(configured()).ensure(resolve_model(configured(), name))
    copy = shutil.copytree(usb, usb.with_name("elsewhere"), copy_function=shutil.copyfile)  # with new time stamps
    shutil.rmtree(usb)
    settings = closed(model_path=copy)
    (spec,) = settings.models.specs()
    assert (spec.alias, spec.name) == (name, name)
    snapshot = load(settings, copy)
    assert (snapshot.hub, snapshot.repository, snapshot.revision) == (original.hub, name, original.revision)
    assert (snapshot.digest, snapshot.files, snapshot.path) == (original.digest, original.files, copy)
    assert str(usb) not in (copy / MIRROR_MANIFEST).read_text()
    assert not any(path.is_symlink() for path in copy.rglob("*"))


def test_mirror_of_an_adapter_contains_its_base_model(
    write: Callable[..., Path], closed: Callable[..., Settings], configured: Callable[..., Settings],
    huggingface: HuggingFaceServer,
) -> None:  # fmt: skip
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    usb = write(LORA)
    original = ModelManager(configured()).ensure(resolve_model(configured(), LORA))
    assert (usb / BASE / "model.safetensors").read_bytes() == WEIGHTS
    snapshot = load(closed(), usb)
    base = snapshot.dependency(HF_REPO)
    assert base is not None
    assert (base.hub, base.revision, base.path) == ("huggingface", huggingface.commit(HF_REPO), usb / BASE)
    assert snapshot.digest == original.digest
    assert findings(closed(), usb) == []
    manager = ModelManager(closed())
    assert manager.prune().models == []
    assert {model.model_name for model in manager.list()} == {str(usb), str(usb / BASE)}


def test_mirror_contains_code_if_it_may_run(
    write: Callable[..., Path], closed: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    """Where code may not run it is not used. A mirror that was made without it says how to make one with it."""
    huggingface.repos |= {HF_REPO: coded_files(), CODE: CODE_FILES}
    usb = write()
    with pytest.raises(IncompleteRepositoryError, match=r"acme/impl.*not in the mirror.*TRUST_REMOTE_CODE=true"):
        load(closed(trust_remote_code=True), usb)
    assert write(trust_remote_code=True) == usb
    assert load(closed(trust_remote_code=True), usb).dependency(CODE) is not None
    assert load(closed(), usb).dependencies == ()


def test_mirror_of_a_directory_has_no_path_of_it(
    write: Callable[..., Path], closed: Callable[..., Settings], tmp_path: Path
) -> None:
    """Its name is that of the directory. The base model that it names by its path is included."""
    write_files(tmp_path / "tuned", adapter_files("../base"))
    write_files(tmp_path / "base", model_files())
    usb = write(str(tmp_path / "tuned"))
    shutil.rmtree(tmp_path / "base")
    assert str(tmp_path) not in (usb / MIRROR_MANIFEST).read_text()
    snapshot = load(closed(), usb)
    assert (snapshot.hub, snapshot.repository, snapshot.revision) == ("local", "tuned", "local")
    assert snapshot.dependency("../base") is not None


def test_mirror_of_a_mirror_is_equal(
    write: Callable[..., Path], closed: Callable[..., Settings], tmp_path: Path, huggingface: HuggingFaceServer
) -> None:
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    usb = write(LORA)
    second, _ = ModelManager(closed()).mirror(resolve_model(closed(), str(usb)), tmp_path / "second")
    assert names_below(tmp_path / "second") == names_below(usb)
    first = mirror.read(usb)
    assert first is not None
    assert (second.name, second.snapshot.digest, second.files) == (first.name, first.snapshot.digest, first.files)


def test_directory_of_a_mirror_needs_no_name_in_the_mapping(
    write: Callable[..., Path], closed: Callable[..., Settings]
) -> None:
    settings = closed(model_mapping={"x": {"path": str(write())}})
    (spec,) = settings.models.specs()
    assert (spec.alias, spec.name) == ("x", HF_REPO)


def test_directory_of_a_configured_model_is_that_model(
    write: Callable[..., Path], closed: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its alias and its own settings, however the directory is written."""
    usb = write()
    monkeypatch.chdir(usb.parent)
    settings = closed(model_mapping={"x": {"path": str(usb), "pooling": "max"}})
    for name in (str(usb), "usb", "./usb/"):
        spec = resolve_model(settings, name)
        assert (spec.alias, spec.pooling) == ("x", "max")


# --- writing again ------------------------------------------------------------------------------------


def test_second_mirror_copies_only_what_has_changed(
    write: Callable[..., Path], configured: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    """Files of the old version are removed only if the mirror wrote them."""
    huggingface.repos[HF_REPO]["old/notes.json"] = b"{}"
    usb = write()
    (usb / "mine.txt").write_text("mine")
    before = on_disk(usb)
    spec = resolve_model(configured(), HF_REPO)
    manager = ModelManager(configured())
    unchanged, changes = manager.mirror(spec, usb)
    assert (changes.copied, changes.removed, on_disk(usb)) == (0, (), before)
    del huggingface.repos[HF_REPO]["old/notes.json"]
    huggingface.repos[HF_REPO]["tokenizer.json"] = b'{"version": "2.0"}'
    updated, changes = manager.mirror(spec, usb, force=True)
    assert (changes.copied, changes.removed) == (1, ("old/notes.json",))
    assert updated.snapshot.revision == huggingface.commit(HF_REPO) != unchanged.snapshot.revision
    assert not (usb / "old").exists()
    assert (usb / "mine.txt").read_text() == "mine"
    assert findings(configured(), usb) == [("mine.txt", "extra")]


def test_interrupted_mirror_is_not_loaded_and_is_continued(
    write: Callable[..., Path], configured: Callable[..., Settings], closed: Callable[..., Settings], tmp_path: Path
) -> None:
    """At no moment is it taken for a complete one, or for a directory of another origin."""
    cancel = CancelToken()

    def stop(progress: Progress) -> None:
        if progress.phase == "verify" and (tmp_path / "usb" / "model.safetensors").exists():
            cancel.cancel()

    manager = ModelManager(configured())
    spec = resolve_model(configured(), HF_REPO)
    manager.ensure(spec)
    with pytest.raises(OperationCancelledError):
        manager.mirror(spec, tmp_path / "usb", on_progress=stop, cancel=cancel)
    assert not (tmp_path / "usb" / "tokenizer.json").exists()
    command = rf"incomplete.*emb-provider mirror {HF_REPO} {tmp_path / 'usb'}"
    with pytest.raises(CorruptSnapshotError, match=command):
        load(closed(), tmp_path / "usb")
    with pytest.raises(CorruptSnapshotError, match=command):
        manager.find(str(tmp_path / "usb"), directories=True)
    _, changes = manager.mirror(spec, tmp_path / "usb")
    assert 0 < changes.copied_bytes < len(WEIGHTS)
    assert findings(closed(), write()) == []


def test_interrupted_update_is_continued_with_another_version(
    write: Callable[..., Path], configured: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    """What each attempt has written is known, and removed if it is not needed."""
    huggingface.repos[HF_REPO]["first.json"] = b"{}"
    usb = write()
    del huggingface.repos[HF_REPO]["first.json"]
    huggingface.repos[HF_REPO]["a_second.json"] = b"[]"
    cancel = CancelToken()
    spec = resolve_model(configured(), HF_REPO)

    def stop(_: Progress) -> None:
        if (usb / "a_second.json").exists():
            cancel.cancel()

    with pytest.raises(OperationCancelledError):
        ModelManager(configured()).mirror(spec, usb, force=True, on_progress=stop, cancel=cancel)
    (usb / ".model.safetensors.mirror-incomplete").write_bytes(b"half")
    (usb / ".mirror-manifest-abc.tmp").write_bytes(b"half")
    del huggingface.repos[HF_REPO]["a_second.json"]
    write(force=True)
    assert names_below(usb) & {"first.json", "a_second.json"} == set()
    assert findings(configured(), usb) == []


@pytest.mark.parametrize("content", [{"other.txt": b"x"}, model_files(), {MIRROR_MANIFEST: b"{"}])
def test_directory_with_something_else_is_refused(
    content: dict[str, bytes], write: Callable[..., Path], tmp_path: Path
) -> None:
    write_files(tmp_path / "usb", content)
    with pytest.raises((NotAllowedError, CorruptSnapshotError), match=r"not empty|invalid"):
        write()
    assert names_below(tmp_path / "usb") == set(content)


def test_mirror_of_another_repository_is_refused(write: Callable[..., Path]) -> None:
    usb = write()
    before = on_disk(usb)
    with pytest.raises(NotAllowedError, match=rf"mirror of {HF_REPO} \(huggingface\), not of {MS_REPO}"):
        write(MS_REPO)
    assert on_disk(usb) == before


def test_mirror_in_the_model_itself_is_refused(configured: Callable[..., Settings], tmp_path: Path) -> None:
    write_files(tmp_path / "model", model_files())
    spec = resolve_model(configured(), str(tmp_path / "model"))
    with pytest.raises(NotAllowedError, match="in the directory of"):
        ModelManager(configured()).mirror(spec, tmp_path / "model" / "copy")


def test_mirror_that_is_loaded_is_not_changed(write: Callable[..., Path], configured: Callable[..., Settings]) -> None:
    usb = write()
    manager = ModelManager(configured())
    with manager.acquire(resolve_model(configured(), str(usb)))[1], pytest.raises(ModelInUseError, match=str(usb)):
        write()
    write()


def test_full_disk_is_reported_and_leaves_no_partial_file(write: Callable[..., Path], tmp_path: Path) -> None:
    """The command to continue is the same. A limit on the size of files stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write()
    (tmp_path / "usb" / "model.safetensors").unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(WEIGHTS) // 2, hard))
    try:
        with pytest.raises(HubError, match=rf"mirrored to {tmp_path / 'usb'}.*too large.*same command again"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "usb").rglob("*mirror-incomplete"))
    write()


def test_mirror_on_a_file_system_without_permissions(
    write: Callable[..., Path], configured: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On FAT and exFAT, permissions cannot be changed."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    ModelManager(configured()).ensure(resolve_model(configured(), HF_REPO))
    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    assert findings(configured(), write()) == []


def test_file_that_changed_in_the_cache_is_not_copied(
    write: Callable[..., Path], configured: Callable[..., Settings], tmp_path: Path
) -> None:
    manager = ModelManager(configured())
    spec = resolve_model(configured(), HF_REPO)
    snapshot = manager.ensure(spec)
    (snapshot.path / "model.safetensors").resolve().write_bytes(WEIGHTS[::-1])
    with pytest.raises(CorruptSnapshotError, match="has changed since it was verified"):
        manager.copy_to(spec, snapshot, tmp_path / "usb")
    assert not (tmp_path / "usb" / "model.safetensors").exists()
    write()  # downloads it again


# --- names that lead elsewhere ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json"])
def test_name_from_a_hub_that_leads_elsewhere_is_refused(
    name: str, write: Callable[..., Path], tmp_path: Path, huggingface: HuggingFaceServer
) -> None:
    huggingface.faults.listed_too.append(name)
    with pytest.raises(HubError):
        write()
    assert not (tmp_path / "usb").exists()


def test_link_in_the_directory_is_not_followed(write: Callable[..., Path], tmp_path: Path) -> None:
    """A link in place of a folder is refused; one in place of a file is replaced by the file."""
    usb = write()
    target = tmp_path / "target"
    shutil.move(usb / "1_Pooling", target)
    (usb / "1_Pooling").symlink_to(target)
    (target / "config.json").write_bytes(b"{}")
    with pytest.raises(NotAllowedError, match="1_Pooling is a symbolic link"):
        write()
    assert (target / "config.json").read_bytes() == b"{}"
    (usb / "1_Pooling").unlink()
    shutil.move(usb / "tokenizer.json", target)
    (usb / "tokenizer.json").symlink_to(target / "tokenizer.json")
    write()
    assert not (usb / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", [MIRROR_MANIFEST, ".dependencies/x.json"])
def test_names_that_mirrors_use_are_refused(
    name: str, write: Callable[..., Path], tmp_path: Path, huggingface: HuggingFaceServer
) -> None:
    huggingface.repos[HF_REPO][name] = b"{}"
    with pytest.raises(NotAllowedError, match=f"named {name}.*--exclude"):
        write()
    assert not (tmp_path / "usb").exists()


def change(content: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files", 0, "path"), "../secret"),
        (("files", 0, "path"), "/etc/passwd"),
        (("files", 0, "sha256"), "0" * 64),
        (("files", 0, "size"), "many"),
        (("dependencies", 0, "directory"), "../base"),
        (("dependencies", 0, "files"), []),
        (("dependencies",), []),
        (("hub",), "elsewhere"),
        (("version",), 2),
        (("files",), None),
        (("name",), None),
    ],
)
def test_invalid_manifest_is_refused(
    path: tuple[str | int, ...], value: object, write: Callable[..., Path], closed: Callable[..., Settings],
    huggingface: HuggingFaceServer,
) -> None:  # fmt: skip
    """It is read from a medium that others can write to."""
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    usb = write(LORA)
    content = json.loads((usb / MIRROR_MANIFEST).read_bytes())
    change(content, path, value)
    (usb / MIRROR_MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptSnapshotError, match=r"mirror-manifest.json is invalid.*Copy the directory again"):
        load(closed(), usb)


# --- loading and verifying ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling/config.json", "README.md", f"{BASE}/tokenizer.json"])
@pytest.mark.parametrize("problem", ["missing", "bytes", "size"])
def test_changed_mirror_is_refused_and_verify_names_the_file(
    file: str, problem: str, write: Callable[..., Path], closed: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    name = HF_REPO if not file.startswith(BASE) else LORA
    huggingface.repos[LORA] = adapter_files(HF_REPO)
    usb = write(name)
    load(closed(), usb)
    right = (usb / file).read_bytes()
    if problem == "missing":
        (usb / file).unlink()
    else:
        (usb / file).write_bytes(right[::-1] if problem == "bytes" else right + b" ")
    with pytest.raises(CorruptSnapshotError, match=rf"{file} in the mirror {usb} .*emb-provider verify {usb}"):
        load(closed(), usb)
    assert findings(closed(), usb) == [(file, problem)]
    (usb / file).write_bytes(right)
    assert findings(closed(), usb) == []
    load(closed(), usb)


def test_files_are_hashed_once(write: Callable[..., Path], closed: Callable[..., Settings]) -> None:
    """The second load of a mirror reads only the manifest, until a time stamp changes."""
    usb = write()
    reports: list[Progress] = []
    for expected in (True, False):
        reports.clear()
        ModelManager(closed()).ensure(resolve_model(closed(), str(usb)), on_progress=reports.append)
        assert bool(reports) == expected


def test_updated_mirror_is_loaded_with_its_new_files(
    write: Callable[..., Path], closed: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    usb = write()
    first = load(closed(), usb)
    huggingface.repos[HF_REPO]["tokenizer.json"] = b'{"version": "2.0"}'
    write(force=True)
    second = load(closed(), usb)
    assert second.revision == huggingface.commit(HF_REPO) != first.revision
    (model,) = ModelManager(closed()).find(str(usb), directories=True)
    assert (model.revision, model.source, model.state) == (second.revision, "local", "complete")


def test_mirror_is_shown_before_it_was_loaded(
    write: Callable[..., Path], closed: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    usb = write()
    manager = ModelManager(closed())
    (model,) = manager.find(str(usb), directories=True)
    details = manager.inspect(model)
    assert (model.revision, details.mirror_of) == (huggingface.commit(HF_REPO), f"{HF_REPO} (huggingface)")
    assert "model.safetensors" in {file.path for file in details.files}
    assert manager.list() == []
    with pytest.raises(NotCachedError, match="no other model is"):  # a name from a client of the service
        manager.find(str(usb))


def test_directory_without_a_manifest_is_not_verified(
    write: Callable[..., Path], closed: Callable[..., Settings]
) -> None:
    """A copy of a mirror without its manifest is not taken for a verified one."""
    usb = write()
    (usb / MIRROR_MANIFEST).unlink()
    with pytest.raises(NotCachedError, match=r"without mirror-manifest.json.*copied incompletely"):
        ModelManager(closed()).find(str(usb), directories=True)


def test_removing_a_mirror_keeps_its_files(write: Callable[..., Path], closed: Callable[..., Settings]) -> None:
    usb = write()
    load(closed(), usb)
    before = on_disk(usb)
    ModelManager(closed()).remove(str(usb))
    assert on_disk(usb) == before
    assert ModelManager(closed()).list() == []


def test_mirror_from_modelscope_is_acquired_with_a_read_only_cache(
    write: Callable[..., Path], closed: Callable[..., Settings], tmp_path: Path, modelscope: ModelScopeServer
) -> None:
    """A snapshot from that hub is otherwise compared with its manifest in the cache."""
    usb = write(MS_REPO)
    (tmp_path / "file").write_text("")
    assert load(closed(cache_dir=tmp_path / "file"), usb).files
    assert modelscope.repos[MS_REPO].keys() == modelscope_files().keys()
