"""Disk, memory, the spool, the journal, and processes that are killed."""

from __future__ import annotations

import json
import random
import stat
import subprocess
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from emb_model_provider.errors import CacheNotWritableError, CorruptSnapshotError, TransferError
from emb_model_provider.transfer.journal import JournalEntry, TransferJournal
from emb_model_provider.transfer.location import Location
from emb_model_provider.transfer.transfer import Transfer
from tests.cli.helpers import SCRIPT
from tests.service import file_sizes, wait_until
from tests.transfer.helpers import DESTINATION, README, SOURCE, TOKEN, mirrored, user
from tests.transfer.servers import BLOCK, DestinationServer, GeneratedFile, SourceServer, listed_sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import Settings

    Make = Callable[..., Transfer]

LARGE_NAME = "model.safetensors"


def large_repository(size: int) -> dict[str, bytes]:
    return {"README.md": README, "config.json": b"{}", LARGE_NAME: GeneratedFile(size, seed=3)}


def transfer_watched(directory: Path, variables: dict[str, str], *options: str) -> dict[str, Any]:
    """Transfer in a process, and return its output with its growth in memory and its largest use of disk, in bytes.

    The growth is measured from the moment at which the transfer begins, after all imports.
    """
    command = [str(SCRIPT), "transfer", SOURCE, DESTINATION, "--json", "--progress", "json", *options]
    disk, memory, start = 0, 0, 0
    shown = directory.with_name(f"{directory.name}-stderr")
    with (
        shown.open("w") as stderr,
        subprocess.Popen(command, cwd=directory, env=variables, stdout=subprocess.PIPE, stderr=stderr) as process,
    ):
        while process.poll() is None:
            time.sleep(0.01)
            disk = max(disk, sum(file_sizes(directory)))
            with suppress(psutil.NoSuchProcess):
                memory = max(memory, psutil.Process(process.pid).memory_info().rss)
            if not start and '"transfer"' in shown.read_text():
                start = memory
        stdout, _ = process.communicate()
    result: dict[str, Any] = json.loads(stdout)
    return {**result, "growth": memory - start, "disk": disk, "start": start}


# --- memory and disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [pytest.param(64), pytest.param(1024, marks=pytest.mark.slow, id="1 GiB")])
def test_a_large_file_needs_little_memory_and_no_disk(megabytes: int, tmp_path: Path) -> None:
    """Memory stays within 100 MB of what it was before the file. No byte of it is written to disk.

    What is written is the journal, and in the home directory the session id of the ModelScope client, 32 bytes.
    """
    with (
        SourceServer({SOURCE: large_repository(megabytes * BLOCK)}) as source,
        DestinationServer({}, token=TOKEN) as destination,
    ):
        destination.keep_bytes = 0
        done = transfer_watched(tmp_path, user(tmp_path, source, destination))
        journal = sum(file_sizes(tmp_path / "cache" / "transfers"))
        file = source.repos[SOURCE][LARGE_NAME]
        assert (done["ok"], destination.blobs[listed_sha256(file)].sha256) == (True, listed_sha256(file))
        received = destination.received_bytes
        source.repos["acme/copy"] = {**source.repos[SOURCE], "config.json": b'{"a": 1}'}
        destination.received_bytes = 0
        second = subprocess.run(
            [str(SCRIPT), "transfer", "acme/copy", "mirrors/copy", "--json"],
            cwd=tmp_path, env=user(tmp_path, source, destination), capture_output=True, check=True,
        )  # fmt: skip
    print(  # noqa: T201 - the figures of docs/HF-to-ModelScope-Transfer.md, shown by `pytest -s`
        f"{megabytes} MiB: memory +{done['growth'] / 1e6:.1f} MB (from {done['start'] / 1e6:.0f} MB), "
        f"disk {done['disk']} B with a journal of {journal} B, "
        f"{done['transfers'][0]['seconds']:.1f} s, second mirror {destination.received_bytes} B of {received} B"
    )
    assert done["growth"] < 100_000_000
    assert done["disk"] <= journal + 32 < 5000
    assert destination.received_bytes < received / 1000
    assert json.loads(second.stdout)["sent_bytes"] == destination.received_bytes


# --- the spool ----------------------------------------------------------------------------------------


def test_a_spooled_file_is_resumed_and_deleted(
    transfer: Make, source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    """What a first run has stored is not read again. The file is named by its hash, and is readable by its owner only."""
    source.repos[SOURCE] = large_repository(12 * BLOCK)
    source.faults.drop_after[LARGE_NAME] = []
    spool = tmp_path / "spool"
    destination.uploads.statuses["PUT"] = [(403, {})]
    with pytest.raises(Exception, match="access was refused"):
        transfer(spool=spool).run(SOURCE, DESTINATION)
    (part,) = spool.iterdir()
    sha256 = listed_sha256(source.repos[SOURCE][LARGE_NAME])
    assert part.name == f"{sha256}.part"
    assert stat.S_IMODE(part.stat().st_mode) == 0o600
    with part.open("r+b") as stream:
        stream.truncate(5 * BLOCK)
    source.forget()
    assert transfer(spool=spool).run(SOURCE, DESTINATION).state == "done"
    ranges = [request.headers.get("range") for request in source.requests if request.storage]
    assert ranges == [f"bytes={5 * BLOCK}-"]
    assert list(spool.iterdir()) == []
    assert destination.wrong_blobs() == []


def test_files_with_the_same_bytes_share_the_spool(
    transfer: Make, source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    file = GeneratedFile(9 * BLOCK, seed=4)
    source.repos[SOURCE] |= {f"copy{number}.bin": file for number in range(4)}
    assert transfer(spool=tmp_path / "spool").run(SOURCE, DESTINATION).state == "done"
    assert destination.put_counts[listed_sha256(file)] == 1
    assert destination.wrong_blobs() == []


def test_a_damaged_spool_is_detected(
    transfer: Make, source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    source.repos[SOURCE] = large_repository(9 * BLOCK)
    part = tmp_path / f"{listed_sha256(source.repos[SOURCE][LARGE_NAME])}.part"
    part.write_bytes(bytes(2 * BLOCK))
    with pytest.raises(CorruptSnapshotError, match="other bytes than the hub lists"):
        transfer(spool=tmp_path).run(SOURCE, DESTINATION)
    assert (part.exists(), destination.blobs) == (False, {})
    assert transfer(spool=tmp_path).run(SOURCE, DESTINATION).state == "done"


def test_a_spool_that_is_a_link_or_not_writable_is_an_error(
    transfer: Make, source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    source.repos[SOURCE] = large_repository(9 * BLOCK)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"{listed_sha256(source.repos[SOURCE][LARGE_NAME])}.part").symlink_to(victim)
    with pytest.raises(TransferError, match="symbolic links"):
        transfer(spool=tmp_path).run(SOURCE, DESTINATION)
    assert victim.read_text() == "mine"
    with pytest.raises(CacheNotWritableError, match="--spool"):
        transfer(spool=victim / "below").run(SOURCE, DESTINATION)


# --- the journal --------------------------------------------------------------------------------------


def test_the_journal_has_a_line_for_each_step(
    transfer: Make, settings: Settings, source: SourceServer, destination: DestinationServer
) -> None:
    transfer().run(SOURCE, DESTINATION)
    (path,) = (settings.hubs.cache_dir / "transfers").iterdir()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    states = [entry["state"] for entry in entries]
    assert (states[0], states[-1]) == ("created", "verified")
    assert (states.count("committed"), states.count("uploaded")) == (5, 1)
    (uploaded,) = (entry for entry in entries if entry["state"] == "uploaded")
    assert uploaded["sha256"] == listed_sha256(source.repos[SOURCE][LARGE_NAME])
    assert {entry["commit"] for entry in entries} == {source.commit(SOURCE)}
    assert {(entry["source"], entry["destination"]) for entry in entries} == {
        (f"huggingface:{SOURCE}", f"modelscope:{DESTINATION}")
    }


def test_a_torn_line_is_ignored(tmp_path: Path) -> None:
    """A killed process can leave half of a line, at the end and later in the middle."""
    source, destination = Location("huggingface", "a/b"), Location("modelscope", "a/b")
    journal = TransferJournal(tmp_path, source, destination)
    journal.append("c", JournalEntry("created"))
    with journal.path.open("ab") as stream:
        stream.write(b'{"time": "2026-01-01", "state": "veri')
    again = TransferJournal(tmp_path, source, destination)
    assert again.has_created
    again.append("c", JournalEntry("verified"))
    assert not TransferJournal(tmp_path, source, destination).has_created
    assert len(journal.path.read_bytes().splitlines()) == 3


def test_a_journal_that_cannot_be_written_does_not_stop_the_transfer(
    transfer: Make, settings: Settings, source: SourceServer, destination: DestinationServer
) -> None:
    settings.hubs.cache_dir.write_text("a file")
    assert transfer().run(SOURCE, DESTINATION).state == "done"
    assert mirrored(source, destination)


# --- killed processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [pytest.param(3), pytest.param(50, marks=pytest.mark.slow)])
def test_killed_processes_never_leave_a_destination_that_verifies_wrongly(
    kills: int, tmp_path: Path, settings: Settings, source: SourceServer, destination: DestinationServer
) -> None:
    """After each SIGKILL at a random moment, stored blobs are right, and a verification says what the truth is."""
    moments = random.Random(kills)  # noqa: S311 - the same each time
    variables = user(tmp_path, source, destination)
    left: Counter[str] = Counter()
    number = 0
    for _ in range(kills):
        name, copy = f"acme/m{number}", f"mirrors/m{number}"
        source.repos.setdefault(name, several_files(number))
        destination.forget()
        with subprocess.Popen(
            [str(SCRIPT), "transfer", name, copy, "--jobs", "2"],
            cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            wait_until(lambda: destination.requests or process.poll() is not None)
            assert destination.requests, process.stderr.read()
            time.sleep(moments.uniform(0, 1.0))
            process.kill()
        assert destination.wrong_blobs() == []
        # The destination can still be storing what the killed process sent.
        was_complete = copy in destination.repos and mirrored(source, destination, name, copy)
        state = Transfer(settings).verify(name, copy).state
        is_complete = copy in destination.repos and mirrored(source, destination, name, copy)
        assert state in {"same" if complete else "differs" for complete in (was_complete, is_complete)}
        exists = "committed in part" if any(each["repo"] == copy for each in destination.commits) else "not committed"
        left["complete" if is_complete else exists] += 1
        number += is_complete
    print(f"{kills} kills left: {dict(left)}")  # noqa: T201 - likewise
    subprocess.run([str(SCRIPT), "transfer", name, copy], cwd=tmp_path, env=variables, check=True, capture_output=True)
    assert mirrored(source, destination, name, copy)


def several_files(number: int) -> dict[str, bytes]:
    """Return a repository with large files, and with more small ones than fit into one commit."""
    content = random.Random(number)  # noqa: S311 - test data
    return {
        "README.md": README,
        **{f"small/{index}.txt": content.randbytes(60_000) for index in range(150)},
        **{f"{index}.bin": content.randbytes(2_000_000) for index in range(6)},
    }
