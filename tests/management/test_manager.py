"""The manager with the real clients and two hubs' servers: fetch, list, find, check and remove."""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import HubError, ManagementError, ModelInUseError, NotCachedError
from emb_model_provider.management.manager import ModelManager, get_model_manager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.model_spec import BUNDLED_MODEL
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files, modelscope_files
from tests.hubs.test_existing_caches import write
from tests.management.conftest import on_disk
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.snapshot import Snapshot
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


def make_empty(configured: Callable[..., Settings]) -> None:
    """Make the roots of the caches, which nobody removes."""
    hubs = configured().hubs()
    for directory in (hubs.cache_dir, hubs.hf_cache_dir, hubs.modelscope_cache_dir):
        assert directory is not None
        directory.mkdir()


def test_after_removal_the_disk_is_as_it_was(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """A model from each hub, fetched, held, released and removed, leaves nothing: no manifest, lock or directory."""
    make_empty(configured)
    before = on_disk(tmp_path)
    for name in (HF_REPO, MS_REPO):
        _, hold = manager.acquire(resolve_model(configured(), name))
        hold.release()
    assert [entry.name for entry in manager.list()] == [HF_REPO, MS_REPO]
    freed = sum(manager.evict_model(name).freed for name in (HF_REPO, MS_REPO))
    assert freed >= 2 * len(WEIGHTS)
    assert not manager.list()
    assert on_disk(tmp_path) == before


def test_the_list_tells_what_there_is(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    """Sizes, hub, revision, place, times and state, as objects and as the guide's plain values."""
    path = manager.ensure_model_cached(HF_REPO)
    (entry,) = manager.list()
    assert (entry.name, entry.id, entry.hub, entry.path) == (HF_REPO, "acme_tiny", "huggingface", path)
    assert (entry.revision, entry.asked_revision) == (huggingface.commit(HF_REPO), None)
    assert entry.size == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert (entry.state, entry.in_use, entry.artifacts) == ("complete", False, ())
    assert entry.fetched is not None
    assert entry.last_used is not None
    (info,) = manager.list_cached_models()
    assert (info["model_name"], info["size"], info["path"]) == (HF_REPO, entry.size, str(path))


def test_using_a_model_again_says_so_without_a_request(
    configured: Callable[..., Settings], manager: ModelManager, huggingface: HuggingFaceServer
) -> None:
    """`last_used` is when it was asked for last, `fetched` when it came."""
    manager.ensure_model_cached(HF_REPO)
    (first,) = manager.list()
    manifest = next(configured().hubs().cache_dir.rglob("*.json"))
    os.utime(manifest, (1, 1))
    huggingface.forget()
    manager.ensure_model_cached(HF_REPO)
    (second,) = manager.list()
    assert not huggingface.requests
    assert second.fetched == first.fetched
    assert second.last_used is not None
    assert second.last_used.timestamp() > 1


def test_questions_that_lead_to_one_directory_are_one_model(
    configured: Callable[..., Settings], manager: ModelManager, huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    """A branch, its commit and a part of its files are listed once, found by each, and removed together."""
    make_empty(configured)
    before = on_disk(tmp_path)
    commit = huggingface.commit(HF_REPO)
    manager.ensure_model_cached(HF_REPO, include=["*.json"])
    manager.ensure_model_cached(HF_REPO, revision=commit)
    manager.ensure_model_cached(HF_REPO)
    (entry,) = manager.list()
    assert entry.asked_revision is None
    for revision in (commit, commit[:8]):
        assert manager.find(HF_REPO, revision=revision) == [entry]
    manager.remove(HF_REPO, revision=commit)
    assert on_disk(tmp_path) == before


def test_other_revisions_keep_the_files_they_share(
    manager: ModelManager, huggingface: HuggingFaceServer
) -> None:
    """Of two revisions of a repository one is removed; the other is whole, though their weights are one file."""
    huggingface.revisions = ("main", "v1")
    old = manager.ensure_model_cached(HF_REPO, revision="v1")
    huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert", "hidden_size": 16}'
    new = manager.ensure_model_cached(HF_REPO)
    assert old != new
    removal = manager.remove(HF_REPO, revision="v1")
    assert removal.freed < len(WEIGHTS)
    assert not old.exists()
    (entry,) = manager.list()
    assert entry.path == new
    assert manager.verify(entry).ok
    assert manager.remove(HF_REPO).freed > len(WEIGHTS)


def test_what_two_revisions_share_counts_once_and_goes_with_the_last(
    manager: ModelManager, huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    """Two revisions with one file of weights: removing both, by name or with all, frees what it takes, as was foretold."""
    huggingface.revisions = ("main", "v1")
    for remove in (
        lambda *, dry_run: manager.remove(HF_REPO, dry_run=dry_run),
        lambda *, dry_run: manager.remove_all(dry_run=dry_run),
    ):
        huggingface.repos[HF_REPO] = model_files()
        manager.ensure_model_cached(HF_REPO, revision="v1")
        huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert", "hidden_size": 16}'
        manager.ensure_model_cached(HF_REPO)
        blobs = (tmp_path / "hf" / "models--acme--tiny" / "blobs").iterdir()
        taken = sum(blob.stat().st_size for blob in blobs)
        assert len(WEIGHTS) < taken < 2 * len(WEIGHTS)
        assert remove(dry_run=True).freed == remove(dry_run=False).freed == taken
        assert not manager.list()


@pytest.mark.parametrize(
    "name", [HF_REPO, "acme_tiny", "model", "acme/model"], ids=["own", "id", "alias", "mapped"]
)
def test_a_model_is_found_by_each_of_its_names(configured: Callable[..., Settings], name: str) -> None:
    """By the hub's name, its id, an alias of the settings, and the name that the settings map to the hub's."""
    settings = configured(
        model_mapping={"model": {"name": HF_REPO}},
        hub_names={"acme/model": {"huggingface": HF_REPO}},
    )
    manager = ModelManager(settings)
    manager.ensure_model_cached("acme/model")
    (entry,) = manager.find(name)
    assert entry.name == HF_REPO


def test_a_name_that_is_not_there_is_an_error_that_names_what_is(manager: ModelManager) -> None:
    """The nearest names are told, and the command that fetches; the last part of a name is enough where just one has it."""
    with pytest.raises(NotCachedError, match="nor is any other"):
        manager.find("acme/tyni")
    manager.ensure_model_cached(HF_REPO)
    assert manager.find("tiny")[0].name == HF_REPO
    manager.ensure_model_cached(MS_REPO)
    with pytest.raises(NotCachedError, match=r"acme/tiny.*emb-provider pull acme/tyni"):
        manager.find("acme/tyni")
    for wrong in ({"source": "modelscope"}, {"revision": "v9"}):
        with pytest.raises(NotCachedError):
            manager.find(HF_REPO, **wrong)
    with pytest.raises(NotCachedError):
        manager.find("tiny")


def test_a_held_model_is_not_removed(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """While somebody uses it, removal is an error and changes nothing; one that waits goes on when it is let go."""
    _, hold = manager.acquire(resolve_model(configured(), MS_REPO))
    before = on_disk(tmp_path)
    assert manager.list()[0].in_use
    for dry_run in (False, True):
        with pytest.raises(ModelInUseError, match="Nothing was removed"):
            manager.remove(MS_REPO, dry_run=dry_run)
    removal = manager.remove_all()
    assert [entry.name for entry, _ in removal.kept] == [MS_REPO]
    assert on_disk(tmp_path) == before
    threading.Timer(0.3, hold.release).start()
    assert [entry.name for entry in manager.remove(MS_REPO, wait_s=60.0).snapshots] == [MS_REPO]
    assert not manager.list()


def test_several_models_of_a_name_are_removed_all_or_none(
    configured: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    """One name on both hubs, one of them in use: both stay; a hub that is named narrows it."""
    huggingface.repos[MS_REPO] = model_files()
    manager = ModelManager(configured())
    for source in ("huggingface", "modelscope"):
        manager.ensure_model_cached(MS_REPO, source=source)
    _, hold = manager.acquire(resolve_model(configured(), MS_REPO, source="modelscope"))
    with pytest.raises(ModelInUseError):
        manager.remove(MS_REPO)
    assert len(manager.list()) == 2
    manager.remove(MS_REPO, source="huggingface")
    assert [entry.hub for entry in manager.list()] == ["modelscope"]
    hold.release()


def test_a_dry_run_says_what_would_go_and_removes_nothing(manager: ModelManager, tmp_path: Path) -> None:
    """The figures are those of the removal that follows."""
    manager.ensure_model_cached(HF_REPO)
    before = on_disk(tmp_path)
    would = manager.remove(HF_REPO, dry_run=True)
    assert manager.remove_all(dry_run=True).freed == would.freed
    assert on_disk(tmp_path) == before
    assert manager.remove(HF_REPO).freed == would.freed


def test_what_others_left_is_listed_when_asked_for_and_never_removed(
    configured: Callable[..., Settings], manager: ModelManager
) -> None:
    """A cache that other programs made is shown as unverified; remove_all and prune leave it alone."""
    hubs = configured().hubs()
    assert hubs.modelscope_cache_dir is not None
    theirs = hubs.modelscope_cache_dir / "hub" / "models" / "iic" / "other-v1___5"
    write(theirs, modelscope_files())
    manager.ensure_model_cached(MS_REPO)
    assert [entry.name for entry in manager.list()] == [MS_REPO]
    other = next(entry for entry in manager.list(everything=True) if entry.name != MS_REPO)
    assert (other.name, other.state, other.path) == ("iic/other-v1.5", "unverified", theirs)
    with pytest.raises(NotCachedError, match="another program put it there"):
        manager.remove("iic/other-v1.5")
    before = on_disk(theirs)
    manager.remove_all()
    manager.prune()
    assert on_disk(theirs) == before


def test_of_a_directory_and_of_the_bundled_model_only_what_is_ours_goes(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """Their manifests are removed, their files are not; a directory is found by its path."""
    make_empty(configured)
    write(tmp_path / "mine", model_files())
    before = on_disk(tmp_path)
    manager.ensure_model_cached(str(tmp_path / "mine"))
    bundled = manager.ensure_model_cached(BUNDLED_MODEL)
    assert {entry.hub for entry in manager.list()} == {"local", "bundled"}
    assert not any(entry.owns_files for entry in manager.list())
    assert manager.inspect(manager.find(str(tmp_path / "mine"))[0])["dimensions"] == 8
    assert manager.remove(str(tmp_path / "mine")).freed == 0
    manager.remove(BUNDLED_MODEL)
    assert on_disk(tmp_path) == before
    assert (bundled / "model.safetensors").is_file()


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_damage_is_found_and_mended(manager: ModelManager, repo: str) -> None:
    """Other bytes of the same size and time, and a missing file, are told; then the next use fetches them again."""
    path = manager.ensure_model_cached(repo)
    (entry,) = manager.find(repo)
    assert manager.verify(entry).ok
    weights = (path / ("model.safetensors" if repo == HF_REPO else "pytorch_model.bin")).resolve()
    stat = weights.stat()
    weights.write_bytes(WEIGHTS[::-1])
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (path / "config.json").unlink()
    assert manager.find(repo)[0].state == "damaged"
    found = manager.verify(entry)
    assert not found.ok
    problems = {finding.path: finding.problem for finding in found.findings}
    assert sorted(problems.values()) == ["bytes", "missing"]
    assert problems["config.json"] == "missing"
    manager.ensure_model_cached(repo)
    assert manager.verify(manager.find(repo)[0]).ok
    assert weights.read_bytes() == WEIGHTS


def test_bytes_that_rotted_are_not_served_once_they_were_found(manager: ModelManager) -> None:
    """A file of the right size and time with other bytes makes the model damaged from the verification on."""
    path = manager.ensure_model_cached(MS_REPO)
    stat = (path / "pytorch_model.bin").stat()
    (path / "pytorch_model.bin").write_bytes(WEIGHTS[::-1])
    os.utime(path / "pytorch_model.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (entry,) = manager.list()
    assert entry.state == "complete"
    assert manager.verify(entry).snapshot.state == "damaged"
    assert manager.list()[0].state == "damaged"
    manager.ensure_model_cached(MS_REPO)
    assert manager.list()[0].state == "complete"
    assert (path / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_removal_follows_no_link(manager: ModelManager, tmp_path: Path) -> None:
    """A link that was put into a snapshot goes, what it points to stays; a snapshot behind a link is left alone."""
    write(tmp_path / "precious", {"a.txt": b"a", "config.json": b"{}"})
    path = manager.ensure_model_cached(HF_REPO)
    (path / "link").symlink_to(tmp_path / "precious")
    (path / "file").symlink_to(tmp_path / "precious" / "a.txt")
    manager.remove(HF_REPO)
    assert not path.exists()
    assert (tmp_path / "precious" / "a.txt").read_bytes() == b"a"

    path = manager.ensure_model_cached(MS_REPO)
    shutil.move(path.parent, tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManagementError, match="symbolic link"):
        manager.remove(MS_REPO)
    assert (tmp_path / "elsewhere" / "master" / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_manifest_that_points_elsewhere_removes_nothing(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """A manifest whose directory no client could have made is refused, with its directory in the error."""
    path = manager.ensure_model_cached(MS_REPO)
    shutil.copytree(path, tmp_path / "precious")
    for manifest in configured().hubs().cache_dir.rglob("*.json"):
        manifest.write_text(manifest.read_text().replace(str(path), str(tmp_path / "precious")))
    with pytest.raises(ManagementError, match="left alone"):
        manager.remove(MS_REPO)
    assert (tmp_path / "precious" / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_an_older_cache_is_removed_where_it_lies(
    configured: Callable[..., Settings], modelscope: ModelScopeServer
) -> None:
    """A model that was taken over from an older client's cache goes, its neighbours and the cache stay."""
    hubs = configured().hubs()
    assert hubs.modelscope_cache_dir is not None
    root = hubs.modelscope_cache_dir / "hub" / "models" / "iic"
    modelscope.repos["iic/tiny-v1.5"] = modelscope_files()
    write(root / "tiny-v1___5", modelscope_files())
    (root / "tiny-v1.5").symlink_to("tiny-v1___5")
    write(root / "other", modelscope_files())
    manager = ModelManager(configured())
    manager.ensure_model_cached("iic/tiny-v1.5")
    manager.evict_model("iic/tiny-v1.5")
    assert [path.name for path in root.iterdir()] == ["other"]
    assert (root / "other" / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_copy_is_made_and_checked(manager: ModelManager, tmp_path: Path) -> None:
    """`local_dir` gets plain files with the right bytes; one that was changed there is replaced."""
    copy = manager.ensure_model_cached(HF_REPO, local_dir=tmp_path / "copy")
    assert copy == tmp_path / "copy"
    assert (copy / "model.safetensors").read_bytes() == WEIGHTS
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    (copy / "config.json").write_text("{}")
    manager.ensure_model_cached(HF_REPO, local_dir=str(copy))
    assert (copy / "config.json").read_bytes() == model_files()["config.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_a_copy_that_does_not_fit_leaves_no_half_file(manager: ModelManager, tmp_path: Path) -> None:
    """A full disk is told with its directory, and what was written of the file goes again."""
    (tmp_path / "copy").mkdir()
    partial = tmp_path / "copy" / ".model.safetensors.incomplete"
    partial.symlink_to("/dev/full")
    with pytest.raises(HubError, match=rf"copied to {tmp_path / 'copy'}.*No space left"):
        manager.ensure_model_cached(HF_REPO, local_dir=tmp_path / "copy")
    assert not partial.is_symlink()
    assert not (tmp_path / "copy" / "model.safetensors").exists()


def test_the_hub_is_chosen_as_the_guide_shows(
    configured: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    """`use_modelscope` chooses for names that say nothing; without it the settings do."""
    huggingface.repos[MS_REPO] = model_files()
    settings = configured()
    assert (
        "ms" in get_model_manager(use_modelscope=True, settings=settings).ensure_model_cached(MS_REPO).parts
    )
    other = get_model_manager(use_modelscope=False, settings=settings)
    assert "hf" in other.ensure_model_cached(MS_REPO).parts
    other.evict_model(MS_REPO)
    assert [entry.hub for entry in other.list()] == ["modelscope"]
    assert "ms" in get_model_manager(settings=settings).ensure_model_cached(MS_REPO).parts


def test_a_model_removed_before_it_is_held_is_fetched_again(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer
) -> None:
    """Between its fetch and the hold somebody removes it, once: what is returned is there, and held."""

    class Unlucky(ModelManager):
        def ensure(self, spec: ModelSpec, **options: Any) -> Snapshot:
            snapshot = super().ensure(spec, **options)
            if modelscope.bodies()["pytorch_model.bin"] == 1:
                manager.remove(MS_REPO)
            return snapshot

    snapshot, hold = Unlucky(configured()).acquire(resolve_model(configured(), MS_REPO))
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    with pytest.raises(ModelInUseError):
        manager.remove(MS_REPO)
    hold.release()
    assert modelscope.bodies()["pytorch_model.bin"] == 2


def test_whoever_holds_a_model_has_all_of_it(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer
) -> None:
    """Threads that acquire and release, one that removes and one that looks on: whoever holds it has all of its files."""
    spec = resolve_model(configured(), MS_REPO)
    stop = threading.Event()
    failures: list[BaseException] = []

    def remove() -> None:
        while not stop.is_set():
            try:
                manager.remove(MS_REPO)
            except (NotCachedError, ModelInUseError):
                pass
            except BaseException as error:  # noqa: BLE001 (told to the test)
                failures.append(error)
                return

    def use() -> None:
        try:
            for _ in range(6):
                snapshot, hold = manager.acquire(spec)
                with hold:
                    assert {
                        file.path for file in snapshot.files if (snapshot.path / file.path).is_file()
                    } == {file.path for file in snapshot.files}
        except BaseException as error:  # noqa: BLE001 (told to the test)
            failures.append(error)

    def look() -> None:
        while not stop.is_set():
            try:
                for entry in manager.list():
                    assert not manager.verify(entry).findings
            except NotCachedError:
                pass
            except BaseException as error:  # noqa: BLE001 (told to the test)
                failures.append(error)
                return

    others = [threading.Thread(target=each) for each in (remove, look)]
    users = [threading.Thread(target=use) for _ in range(2)]
    for thread in (*others, *users):
        thread.start()
    for thread in users:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert not failures
    wait_until(lambda: not manager.list() or not manager.list()[0].in_use)
    assert modelscope.bodies()["pytorch_model.bin"] >= 1
