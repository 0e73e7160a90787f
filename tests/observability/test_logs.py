"""Log lines and log files, without a service."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import SettingsError
from emb_model_provider.observability.log_file import Rotation
from emb_model_provider.observability.logs import LOG_FILE, request_id, start_logging
from emb_model_provider.settings import LogSettings
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger("emb_model_provider.tests")


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Restore the handlers and levels of pytest."""
    root, ours = logging.getLogger(), logging.getLogger("emb_model_provider")
    handlers, levels = root.handlers, (root.level, ours.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(capture=False)


def log_messages(directory: Path, as_json: bool, *messages: str, rotation: Rotation | None = None) -> list[str]:
    """Log messages as a service does, and return the lines of its file."""
    writer = start_logging(LogSettings(log_format="json" if as_json else "text", log_dir=directory), rotation)
    for message in messages:
        logger.info("%s", message)
    writer.stop()
    return (directory / LOG_FILE).read_text(encoding="utf-8").split("\n")[:-1]


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    "evil", ["a\nb", "a\r\nb", "a\x1b[2Jb", "a\u2028b", "a\x85b", "a\x00b", "a\u202eb", "a\ud800b"]
)
def test_message_is_one_line(tmp_path: Path, as_json: bool, evil: str) -> None:
    """No character of a message breaks its line or moves the cursor of a terminal."""
    (line,) = log_messages(tmp_path, as_json, evil)
    assert line.isprintable()
    message = json.loads(line)["message"] if as_json else line
    assert message.endswith("b")
    assert "\\" in message


@pytest.mark.parametrize("as_json", [True, False])
def test_text_of_all_languages_is_readable(tmp_path: Path, as_json: bool) -> None:
    """Letters outside of ASCII are not escaped."""
    (line,) = log_messages(tmp_path, as_json, "模型 café 😀")
    assert "模型 café 😀" in line


@pytest.mark.parametrize("as_json", [True, False])
def test_traceback_cannot_forge_lines(tmp_path: Path, as_json: bool) -> None:
    """A traceback is indented below its line in text, and one field of the line in JSON."""
    writer = start_logging(LogSettings(log_format="json" if as_json else "text", log_dir=tmp_path))
    try:
        int("first\n2026-01-01 00:00:00.000 INFO    forged")
    except ValueError:
        logger.exception("it failed")
    writer.stop()
    first, *rest = (tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert "it failed" in first
    if as_json:
        assert rest == []
        assert json.loads(first)["traceback"].startswith("Traceback (most recent call last):\n")
    else:
        assert rest[0] == "    Traceback (most recent call last):"
        assert rest[-1].startswith("    ValueError: invalid literal")
        assert all(line.startswith("    ") for line in rest)


def test_line_has_the_id_of_its_request(tmp_path: Path) -> None:
    """A line has the id of the request that logged it, although another thread writes it."""
    writer = start_logging(LogSettings(log_format="json", log_dir=tmp_path))
    token = request_id.set("mine")
    logger.info("during")
    request_id.reset(token)
    logger.info("after")
    writer.stop()
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    assert [(line["message"], line.get("request_id")) for line in lines] == [("during", "mine"), ("after", None)]


def test_level_applies_to_this_package_only(tmp_path: Path) -> None:
    """LOG_LEVEL applies to this package. Libraries log from WARNING on."""
    writer = start_logging(LogSettings(log_format="json", log_dir=tmp_path, log_level="DEBUG"))
    logger.debug("ours")
    logging.getLogger("some.library").info("not this")
    logging.getLogger("some.library").warning("but this")
    writer.stop()
    lines = (tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["ours", "but this"]


def test_file_is_rotated_by_size(tmp_path: Path) -> None:
    """A file that would become too large is renamed to .1, and a limited number of files is kept."""
    rotation = Rotation(max_bytes=2000, kept_files=2)
    log_messages(tmp_path, True, *(f"{number} {'x' * 500}" for number in range(30)), rotation=rotation)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_FILE, f"{LOG_FILE}.1", f"{LOG_FILE}.2"]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert "29 xxx" in (tmp_path / LOG_FILE).read_text(encoding="utf-8")


def test_file_is_rotated_by_age(tmp_path: Path) -> None:
    """A file that is too old is renamed at the next line, whatever its size."""
    writer = start_logging(LogSettings(log_format="json", log_dir=tmp_path), Rotation(max_age_s=0.05))
    logger.info("old")
    wait_until(lambda: "old" in (tmp_path / LOG_FILE).read_text(encoding="utf-8"))
    time.sleep(0.1)
    logger.info("new")
    writer.stop()
    assert "old" in (tmp_path / f"{LOG_FILE}.1").read_text(encoding="utf-8")
    assert "old" not in (tmp_path / LOG_FILE).read_text(encoding="utf-8")


def test_age_includes_earlier_processes(tmp_path: Path) -> None:
    """An old file of an earlier process is renamed, and a recent one is continued."""
    log_messages(tmp_path, True, "first")
    assert len(log_messages(tmp_path, True, "second")) == 2
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / LOG_FILE, (two_days_ago, two_days_ago))
    assert len(log_messages(tmp_path, True, "third")) == 1
    assert (tmp_path / f"{LOG_FILE}.1").exists()


def test_removed_directory_is_created_again(tmp_path: Path) -> None:
    """The lines after the removal of the file, or of its directory, are not lost. The same holds for a renamed file."""
    directory = tmp_path / "logs"
    writer = start_logging(LogSettings(log_format="json", log_dir=directory))

    def log_and_read(message: str) -> str:
        logger.info("%s", message)
        wait_until(lambda: (directory / LOG_FILE).exists() and message in (directory / LOG_FILE).read_text())
        return (directory / LOG_FILE).read_text()

    log_and_read("first")
    shutil.rmtree(directory)
    assert "first" not in log_and_read("second")
    (directory / LOG_FILE).rename(directory / "renamed")
    assert "second" not in log_and_read("third")
    writer.stop()


def test_rotation_that_fails_removes_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If no new file can be created, the current one grows, and one line says so until a rotation succeeds."""
    rotation = Rotation(max_bytes=2000, kept_files=2, retry_after_s=0)
    messages = [f"{number} {'x' * 500}" for number in range(10)]
    log_messages(tmp_path, True, *messages, rotation=rotation)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (tmp_path / f"{LOG_FILE}.new").mkdir()
    (tmp_path / f"{LOG_FILE}.new" / "file").touch()
    capfd.readouterr()
    grown = "\n".join(log_messages(tmp_path, True, *messages, rotation=rotation))
    assert grown.startswith(before.pop(LOG_FILE).strip())
    assert len(grown) > 5000
    assert before == {name: (tmp_path / name).read_text() for name in before}
    assert len(re.findall("cannot be rotated", capfd.readouterr().err)) == 1
    shutil.rmtree(tmp_path / f"{LOG_FILE}.new")
    log_messages(tmp_path, True, "last", rotation=rotation)
    assert (tmp_path / f"{LOG_FILE}.1").read_text().strip() == grown


FULL_DISK = """
import json, logging, sys, time
from pathlib import Path
from emb_model_provider.observability.log_file import Rotation
from emb_model_provider.observability.logs import LOG_FILE, start_logging
from emb_model_provider.settings import LogSettings
directory = Path(sys.argv[1])
rotation = Rotation(max_bytes=10_000, kept_files=2)
(directory / (LOG_FILE + ".1")).write_text("old")
(directory / "filler").write_bytes(bytes(56 * 1024))  # one page is left
writer = start_logging(LogSettings(log_format="json", log_dir=directory), rotation)
logger = logging.getLogger("emb_model_provider.tests")
for number in range(100):
    logger.warning("%d %s", number, "x" * 100)
    time.sleep(0.001)
writer.stop()
assert (directory / (LOG_FILE + ".1")).read_text() == "old"
writer = start_logging(LogSettings(log_format="json", log_dir=directory), rotation)
logger.warning("still full")
time.sleep(0.2)
(directory / "filler").unlink()
logger.warning("free again")
writer.stop()
print((directory / LOG_FILE).read_text())
"""


def test_full_disk(tmp_path: Path) -> None:
    """One line on stderr reports it, without a traceback. No old file is lost. Later lines are complete."""
    command = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64k tmpfs "$1" && exec "$2" -c "$3" "$1"',
    ]
    done = subprocess.run(
        [*command, "sh", str(tmp_path), sys.executable, FULL_DISK],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"cannot mount a file system: {done.stderr}")
    assert done.returncode == 0, done.stderr
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert [message for message in messages if "x" * 100 in message] == [
        f"{number} {'x' * 100}" for number in range(100)
    ]
    problems = [message for message in messages if message.startswith("the log file")]
    assert [re.sub(r"\d+ lines", "N lines", message.partition(LOG_FILE)[2]) for message in problems] == [
        " cannot be written (No space left on device); up to N lines are missing in it",
        " cannot be written (No space left on device); up to N lines are missing in it",
        " works again; up to N lines are missing in it",
    ]
    written = done.stdout.splitlines()
    assert json.loads(written[0])["message"].startswith("0 ")
    last = [json.loads(line)["message"] for line in written[-3:] if line]
    assert last[-1].startswith("the log file")
    assert last[-2] == "free again"


def test_default_directory_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only a setting makes it an error: the working directory of a container is often not writable."""
    (tmp_path / "logs").touch()
    monkeypatch.chdir(tmp_path)
    start_logging(LogSettings(log_format="json")).stop()
    (line,) = capfd.readouterr().err.splitlines()
    assert "EMB_PROVIDER_LOG_DIR=logs: the directory cannot be written" in json.loads(line)["message"]
    assert "EMB_PROVIDER_LOG_TO_FILE=false" in line
    with pytest.raises(SettingsError, match=r"EMB_PROVIDER_LOG_DIR=logs"):
        start_logging(LogSettings(log_to_file=True))


def test_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """The error names the setting, the directory and the setting that disables the file."""
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"EMB_PROVIDER_LOG_DIR=.*EMB_PROVIDER_LOG_TO_FILE=false"):
        start_logging(LogSettings(log_dir=tmp_path / "file" / "logs"))


def test_file_can_be_disabled(tmp_path: Path) -> None:
    """LOG_TO_FILE=false creates neither a file nor a directory."""
    start_logging(LogSettings(log_to_file=False, log_dir=tmp_path / "logs")).stop()
    assert list(tmp_path.iterdir()) == []
