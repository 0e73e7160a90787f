"""A transfer from Hugging Face to ModelScope with the real clients."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import (
    AccessDeniedError,
    CorruptSnapshotError,
    HubUnavailableError,
    OfflineError,
    OperationCancelledError,
    PermissionRequiredError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    TransferError,
)
from emb_model_provider.progress import CancelToken
from emb_model_provider.settings import Settings
from emb_model_provider.transfer import copy
from emb_model_provider.transfer.transfer import Transfer
from tests.hubs.servers import Answer, Request, json_answer
from tests.transfer.helpers import DESTINATION, README, SOURCE, WEIGHTS, mirrored
from tests.transfer.servers import listed_sha256

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.progress import Progress
    from tests.transfer.servers import DestinationServer, SourceServer

    Make = Callable[..., Transfer]


def test_a_repository_is_mirrored(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    """The destination is created with the license and all files, in one commit that names the source's commit."""
    result = transfer().run(SOURCE, DESTINATION)
    assert (result.state, result.created, result.revision) == ("done", True, source.commit(SOURCE))
    assert mirrored(source, destination)
    assert destination.info[DESTINATION] == {"private": False, "license": "mit"}
    (commit,) = destination.commits
    assert commit == {"repo": DESTINATION, "message": f"Mirror of {SOURCE}@{result.revision}", "files": 5}
    assert result.sent_bytes == destination.received_bytes > len(WEIGHTS)


def test_a_second_transfer_sends_nothing(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    """It compares the listings, and reads no file, because the journal knows both hashes of small files."""
    transfer().run(SOURCE, DESTINATION)
    destination.received_bytes = 0
    source.forget()
    result = transfer().run(SOURCE, DESTINATION)
    assert (result.state, result.sent, result.same) == ("same", (), 5)
    assert (destination.received_bytes, len(destination.commits)) == (0, 1)
    assert set(source.bodies()) <= {"README.md"}


def test_the_destination_decides_what_it_has(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """A file that was lost or changed at the destination is sent again, whatever the journal says."""
    transfer().run(SOURCE, DESTINATION)
    del destination.repos[DESTINATION]["model.safetensors"]
    destination.repos[DESTINATION]["vocab.txt"] = b"changed"
    result = transfer().run(SOURCE, DESTINATION)
    assert set(result.sent) == {"model.safetensors", "vocab.txt"}
    assert mirrored(source, destination)


def test_a_second_mirror_of_the_same_weights_sends_only_small_files(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """ModelScope has the weights from another repository: fewer than 0.1 % of the bytes are sent."""
    first = transfer().run(SOURCE, DESTINATION)
    destination.received_bytes = 0
    source.forget()
    source.repos["acme/copy"] = {**source.repos[SOURCE], "vocab.txt": b"[PAD]\n"}
    seen: list[Progress] = []
    second = transfer().run("acme/copy", "mirrors/copy", on_progress=seen.append)
    assert mirrored(source, destination, "acme/copy", "mirrors/copy")
    assert second.sent_bytes == destination.received_bytes < first.sent_bytes / 1000
    assert "model.safetensors" not in source.bodies()
    assert next(each.total_bytes for each in seen if each.phase == "transfer") == second.sent_bytes


def test_files_with_the_same_bytes_are_sent_once(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    source.repos[SOURCE] |= {"copy.safetensors": WEIGHTS, "onnx/model.onnx": WEIGHTS}
    transfer().run(SOURCE, DESTINATION)
    assert destination.put_counts[listed_sha256(WEIGHTS)] == 1
    assert mirrored(source, destination)


def test_card_and_configuration_are_committed_inline(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """ModelScope reads them in the commit, also if they are larger than other files that are sent there."""
    source.repos[SOURCE]["README.md"] = README + b"text\n" * 30_000
    source.repos[SOURCE]["config.json"] = json.dumps({"id2label": {str(n): "x" * 20 for n in range(5000)}}).encode()
    source.repos[SOURCE]["configuration.json"] = b'{"task": "sentence-embedding"}'
    source.repos[SOURCE]["tokenizer.json"] = b"{" + b" " * 90_000 + b"}"
    transfer().run(SOURCE, DESTINATION)
    assert mirrored(source, destination)
    assert listed_sha256(source.repos[SOURCE]["tokenizer.json"]) in destination.blobs
    for name in ("README.md", "config.json", "configuration.json"):
        assert listed_sha256(source.repos[SOURCE][name]) not in destination.blobs


@pytest.mark.parametrize("limit", [3, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_number_of_files_in_a_commit_is_limited(
    limit: int, transfer: Make, source: SourceServer, destination: DestinationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert copy.MAX_FILES_PER_COMMIT == 2000
    monkeypatch.setattr(copy, "MAX_FILES_PER_COMMIT", limit)
    source.repos[SOURCE] |= {f"data/{number}.txt": b"%d" % number for number in range(limit)}
    transfer(jobs=16).run(SOURCE, DESTINATION)
    assert [commit["files"] for commit in destination.commits] == ([3, 3, 2] if limit == 3 else [2000, 5])
    assert mirrored(source, destination)


def test_a_commit_message_is_used(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    transfer(commit_message="同步模型").run(SOURCE, DESTINATION)
    assert destination.commits[0]["message"] == "同步模型"


def test_a_revision_is_pinned(transfer: Make, source: SourceServer) -> None:
    """A branch is resolved to a commit once; an unknown one is an error with exit code 2."""
    assert transfer().plan(f"{SOURCE}@main", DESTINATION).revision == source.commit(SOURCE)
    with pytest.raises(RevisionNotFoundError, match="v9"):
        transfer().run(f"{SOURCE}@v9", DESTINATION)


def test_a_plan_changes_nothing(transfer: Make, destination: DestinationServer) -> None:
    result = transfer().plan(SOURCE, DESTINATION)
    assert (result.state, result.created, len(result.sent)) == ("planned", True, 5)
    assert result.sent_bytes > len(WEIGHTS)
    assert DESTINATION not in destination.repos


def test_verification_compares_both_sides(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    """It transfers nothing, and names the files that are missing or different. Other files are only named."""
    transfer().run(SOURCE, DESTINATION)
    assert transfer().verify(SOURCE, DESTINATION).state == "same"
    repo = destination.repos[DESTINATION]
    del repo["vocab.txt"]
    repo |= {"config.json": b"{}", "own.txt": b"own"}
    before = dict(repo)
    result = transfer().verify(SOURCE, DESTINATION)
    assert (result.state, result.missing, result.different) == ("differs", ("vocab.txt",), ("config.json",))
    assert "own.txt" in result.extra
    assert repo == before


def test_files_of_unequal_bytes_and_equal_size_differ(
    transfer: Make, settings: Settings, destination: DestinationServer
) -> None:
    """The hubs list different hashes of small files, so these are read; also without a journal."""
    transfer().run(SOURCE, DESTINATION)
    for path in (settings.hubs.cache_dir / "transfers").iterdir():
        path.unlink()
    assert transfer().verify(SOURCE, DESTINATION).state == "same"
    own = destination.repos[DESTINATION]["vocab.txt"]
    destination.repos[DESTINATION]["vocab.txt"] = own[::-1]
    assert transfer().verify(SOURCE, DESTINATION).different == ("vocab.txt",)


def test_a_destination_that_lists_no_hashes_is_read(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    destination.lists_hashes = False
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    own = destination.repos[DESTINATION]["vocab.txt"]
    destination.repos[DESTINATION]["vocab.txt"] = own[::-1]
    assert transfer().verify(SOURCE, DESTINATION).different == ("vocab.txt",)


def test_files_of_the_destination_are_never_removed(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    transfer().run(SOURCE, DESTINATION)
    destination.repos[DESTINATION]["own.txt"] = b"own"
    del source.repos[SOURCE]["vocab.txt"]
    source.repos[SOURCE]["new.txt"] = b"new"
    result = transfer().run(SOURCE, DESTINATION)
    assert result.sent == ("new.txt",)
    assert {"own.txt", "vocab.txt"} <= set(destination.repos[DESTINATION])


def test_progress_counts_the_bytes_of_the_transfer(transfer: Make) -> None:
    seen: list[Progress] = []
    transfer().run(SOURCE, DESTINATION, on_progress=seen.append)
    assert list(dict.fromkeys(each.phase for each in seen)) == ["resolve", "transfer", "verify"]
    last = [each for each in seen if each.phase == "transfer"][-1]
    assert last.done_bytes == last.total_bytes > len(WEIGHTS)


# --- faults -------------------------------------------------------------------------------------------


def test_a_dropped_download_continues_in_the_same_upload(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """The upload goes on while the source is asked for the rest of the bytes."""
    source.faults.drop_after["model.safetensors"] = [1_000_000, 0, 500_000]
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert mirrored(source, destination)
    assert destination.received_bytes < len(WEIGHTS) + 10_000


def test_a_dropped_upload_begins_again(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    destination.uploads.drop_put_after[listed_sha256(WEIGHTS)] = [100_000, 2_900_000]
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert mirrored(source, destination)
    assert destination.put_counts[listed_sha256(WEIGHTS)] == 3


def test_wrong_bytes_are_never_stored(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    """An upload of wrong bytes stays incomplete. Wrong bytes that come once are read again."""
    source.faults.wrong_bytes = {"model.safetensors": 2}
    with pytest.raises(CorruptSnapshotError, match=r"model.safetensors has other bytes"):
        transfer().run(SOURCE, DESTINATION)
    assert destination.blobs == {}
    assert destination.commits == []
    source.faults.wrong_bytes = {"model.safetensors": 1, "vocab.txt": 1}
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert mirrored(source, destination)


def test_a_file_of_another_size_is_refused(
    transfer: Make, source: SourceServer, destination: DestinationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub sends more, or fewer, bytes than it lists."""
    listed = source._listed

    def wrong(repo: str, name: str) -> dict[str, object]:
        return listed(repo, name) | ({"size": wrong_size} if name == "vocab.txt" else {})

    monkeypatch.setattr(source, "_listed", wrong)
    wrong_size = 10
    with pytest.raises(CorruptSnapshotError, match=r"larger than the 10 bytes"):
        transfer().run(SOURCE, DESTINATION)
    wrong_size = 10_000_000
    with pytest.raises(HubUnavailableError, match=r"sent only \d+ of the 10000000 bytes"):
        transfer().run(SOURCE, DESTINATION)
    assert destination.commits == []


@pytest.mark.parametrize(
    "request_line", ["PUT /upload/", "POST /api/v1/repos/models/mirrors/tiny/commit/", "/objects/batch", "POST /api/v1/models"]
)  # fmt: skip
def test_retry_after_is_honored(
    request_line: str, transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """A rate limit on any write is waited for as long as the hub asks, then the transfer continues."""
    destination.uploads.statuses[request_line] = [(429, {"Retry-After": "0.4"}), (503, {})]
    result = transfer().run(SOURCE, DESTINATION)
    assert (result.state, destination.uploads.statuses[request_line]) == ("done", [])
    assert result.seconds > 0.4
    assert mirrored(source, destination)


def test_a_rate_limit_of_the_source_is_honored(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    source.uploads.statuses |= {
        "/tree/": [(429, {"Retry-After": "0"})],
        "/resolve/": [(429, {"Retry-After": "0"}), (500, {})],
    }
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert mirrored(source, destination)


def test_a_wait_of_hours_fails_the_repository(transfer: Make, destination: DestinationServer) -> None:
    destination.uploads.statuses["PUT"] = [(429, {"Retry-After": "36000"})]
    with pytest.raises(HubUnavailableError, match="too many requests"):
        transfer().run(SOURCE, DESTINATION)


def test_an_empty_answer_does_not_mean_that_the_files_are_there(
    transfer: Make, destination: DestinationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub mentions only files that it lacks. A response that is not an answer mentions none, and is asked again."""
    route = destination._repository
    answers = [{"Code": 500, "Success": False, "Data": None}, {"Code": 200, "Data": {"objects": []}}]

    def fail(request: Request, repo: str, rest: str) -> Answer:
        is_question = rest.endswith("/batch") and bool(answers)
        return json_answer(answers.pop()) if is_question else route(request, repo, rest)

    monkeypatch.setattr(destination, "_repository", fail)
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert listed_sha256(WEIGHTS) in destination.blobs
    assert answers == []


def test_a_commit_whose_answer_was_lost_is_not_repeated(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """After a lost answer the destination is listed, and the commit is not sent again."""
    destination.uploads.statuses["/commit/"] = [(0, {})]
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert len(destination.commits) == 1


def test_a_commit_that_another_one_overtook_is_repeated(
    transfer: Make, destination: DestinationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = destination._commit
    answers = [{"Code": 400, "Success": False, "Message": "branch changed, please retry"}]

    def conflict(repo: str, body: dict[str, object]) -> object:
        return json_answer(answers.pop(), 400) if answers else commit(repo, body)

    monkeypatch.setattr(destination, "_commit", conflict)
    assert transfer().run(SOURCE, DESTINATION).state == "done"


def test_a_commit_that_stored_other_bytes_is_detected(
    transfer: Make, destination: DestinationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification after the transfer compares what the destination lists."""
    monkeypatch.setattr(destination, "store", lambda repo, path, _: destination.repos[repo].update({path: b"?"}))
    with pytest.raises(TransferError, match=r"differs from .* after the transfer"):
        transfer().run(SOURCE, DESTINATION)


def test_access_errors_name_the_side(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    with pytest.raises(RepositoryNotFoundError, match="huggingface:acme/none"):
        transfer().run("acme/none", DESTINATION)
    destination.denied.add(DESTINATION)
    with pytest.raises(AccessDeniedError, match="mirrors/tiny on ModelScope"):
        transfer().run(SOURCE, DESTINATION)
    source.refused[SOURCE] = (403, "GatedRepo")
    with pytest.raises(AccessDeniedError, match=r"acme/tiny on Hugging Face .* is gated"):
        transfer().run(SOURCE, "mirrors/other")


def test_a_token_of_the_other_site_is_explained(
    settings: Settings, source: SourceServer, destination: DestinationServer
) -> None:
    """modelscope.cn and modelscope.ai have different tokens. Nothing is read before the login is checked."""
    for token, problem in (("other", "the token was rejected"), (None, "no token was sent")):
        values = {name: getattr(settings.hubs, name) for name in ("cache_dir", "hf_endpoint", "modelscope_endpoint")}
        other = Settings.from_values(**values, modelscope_token=token)
        with pytest.raises(AccessDeniedError, match=rf"{problem}.*modelscope.cn and modelscope.ai"):
            Transfer(other).run(SOURCE, DESTINATION)
    assert source.requests == []


def test_nothing_is_requested_offline(settings: Settings, source: SourceServer, destination: DestinationServer) -> None:
    offline = Settings.from_values(cache_dir=settings.hubs.cache_dir, offline=True)
    with pytest.raises(OfflineError, match="EMB_PROVIDER_OFFLINE"):
        Transfer(offline).run(SOURCE, DESTINATION)


def test_a_cancelled_transfer_commits_nothing(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    cancel = CancelToken()

    def on_progress(progress: Progress) -> None:
        if progress.done_bytes > 1_000_000:
            cancel.cancel()

    with pytest.raises(OperationCancelledError):
        transfer().run(SOURCE, DESTINATION, on_progress=on_progress, cancel=cancel)
    assert (destination.blobs, destination.commits) == ({}, [])
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert mirrored(source, destination)


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/passwd", "a/../../b", "a//b", ".git/config", "a\\..\\b", "C:/x", "a\nb", "./x"]
)
def test_a_file_name_that_escapes_is_refused(
    name: str, transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """Nothing of the repository is transferred."""
    source.tree_names["vocab.txt"] = name
    with pytest.raises(CorruptSnapshotError, match="outside of its directory"):
        transfer().run(SOURCE, DESTINATION)
    assert DESTINATION not in destination.repos


def test_control_characters_of_a_hub_are_not_shown(
    transfer: Make, source: SourceServer, destination: DestinationServer
) -> None:
    """A terminal would obey them."""
    transfer().run(SOURCE, DESTINATION)
    destination.repos[DESTINATION]["own\x1b[2J.txt"] = b"own"
    assert "own?[2J.txt" in transfer().verify(SOURCE, DESTINATION).extra
    source.info["acme/odd"] = {"cardData": {"license": "cc-by-nc-4.0\x1b[2J"}}
    source.repos["acme/odd"] = {"LICENSE": b"no\x1b[2J\r\nyes", "config.json": b"{}"}
    with pytest.raises(PermissionRequiredError) as raised:
        transfer().run("acme/odd", "mirrors/odd")
    assert "\x1b" not in str(raised.value)
    assert "no?[2J\nyes" in str(raised.value)


def test_unusual_names_are_transferred(transfer: Make, source: SourceServer, destination: DestinationServer) -> None:
    names = ["模型 说明.txt", "a b/c+d&e=f#g%41.txt", "深/层/文件.json", "-option", "...", "x" * 200]
    source.repos[SOURCE] |= {name: random.Random(name).randbytes(100) for name in names}  # noqa: S311 - test data
    transfer().run(SOURCE, DESTINATION)
    assert mirrored(source, destination)
