"""Mirrors that are written by processes that are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import CorruptSnapshotError
from emb_model_provider.snapshots import mirror
from tests.hubs.helpers import write_files
from tests.models import snapshot_of

if TYPE_CHECKING:
    from pathlib import Path

WRITER = """
import hashlib, pathlib, sys
from emb_model_provider.snapshots import mirror
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile

source, target = map(pathlib.Path, sys.argv[1:])
files = []
for path in sorted(source.rglob("*")):
    if path.is_file():
        body = path.read_bytes()
        files.append(SnapshotFile(path.relative_to(source).as_posix(), len(body), hashlib.sha256(body).hexdigest()))
print("begin", flush=True)
mirror.write(Snapshot.of("huggingface", "acme/small", source.name, source, files), target, "acme/small", lambda *_: None)
print("end", flush=True)
"""


@pytest.mark.slow
def test_killed_writer_never_leaves_a_wrong_mirror(tmp_path: Path) -> None:
    """Two versions replace each other. After each SIGKILL the mirror is one of them, or says that it is incomplete."""
    generator = random.Random(11)  # noqa: S311 - not for security
    for version in ("v1", "v2"):
        files = {f"{version}/{number}.bin": generator.randbytes(200_000) for number in range(6)}
        shared = {f"shared{number}.bin": generator.randbytes(200_000) for number in range(6)}
        write_files(tmp_path / version, files | shared)
    target = tmp_path / "mirror"

    def start(version: str) -> subprocess.Popen[str]:
        """Return a process that writes the mirror from now on."""
        command = [sys.executable, "-c", WRITER, str(tmp_path / version), str(target)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begin\n"
        return writer

    writer, began = start("v1"), time.monotonic()
    writer.communicate()
    duration = time.monotonic() - began
    seen = {"complete": 0, "incomplete": 0}
    for kill in range(300):
        if kill >= 50 and min(seen.values()) > 5:
            break
        writer = start(("v1", "v2")[kill // 2 % 2])
        time.sleep(generator.uniform(0, 2 * duration))  # so that some writers end before they are killed
        writer.kill()
        writer.communicate()
        try:
            found = mirror.read(target)
        except CorruptSnapshotError as error:
            if "is incomplete" not in str(error):
                raise
            seen["incomplete"] += 1
            continue
        if found is not None:
            expected = snapshot_of(tmp_path / found.snapshot.revision)
            assert found.snapshot.digest == expected.digest
            assert mirror.check(found, lambda *_: None) == []
            seen["complete"] += 1
    assert min(seen.values()) > 5, seen
