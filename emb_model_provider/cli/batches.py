"""`emb-provider batches`: batches of the running server, and a file of requests that is answered as one."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import ServerError, out, pairs, print_json, say, show_progress, table
from emb_model_provider.error_table import FAILED, UNREACHABLE, USAGE_ERROR
from emb_model_provider.formatting import format_age, quote
from emb_model_provider.progress import Mode, Phase, Progress, ProgressReporter

if TYPE_CHECKING:
    from emb_model_provider.cli.server_client import ServerClient

_HEAD = ("BATCH", "STATUS", "ENDPOINT", "REQUESTS", "FAILED", "CREATED")
_POLL_S = 1.0
_MAX_UNREACHABLE_S = 300.0
"""How long `run` waits for a server that does not answer, for example while it restarts."""
_PHASES: dict[str, Phase] = {
    "validating": "validate",
    "in_progress": "answer",
    "cancelling": "answer",
    "finalizing": "finalize",
}
"""States of a batch that has not ended to the phases that are shown."""
_MAX_SHOWN_ERRORS = 20
_TIMES = ("created_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelled_at", "expires_at")  # fmt: skip


@click.group()
def batches() -> None:
    """Run files of requests on the server, in the background."""


@batches.command("list")
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="Number of batches, the latest ones."
)
@options.url
@options.quiet("the ids")
@options.json
def list_batches(limit: int, url: str | None, *, quiet: bool, as_json: bool) -> None:
    """List the batches of this API key, the latest first.

    JSON: an array of batches, as GET /v1/batches returns them.
    """
    client = _client(url)
    found: list[dict[str, Any]] = []
    after: str | None = None
    while len(found) < limit:
        page = client.request("GET", "/v1/batches", limit=min(100, limit - len(found)), after=after)
        found += page["data"]
        if not page["has_more"]:
            break
        after = found[-1]["id"]
    if as_json:
        print_json(found)
    elif quiet:
        for batch in found:
            out(batch["id"])
    else:
        out(table(_HEAD, [_row(batch) for batch in found]))


@batches.command()
@click.argument("batch", metavar="ID")
@options.url
@options.json
def show(batch: str, url: str | None, *, as_json: bool) -> None:
    """Show a batch.

    JSON: the batch, as GET /v1/batches/ID returns it.
    """
    _print(_client(url).request("GET", f"/v1/batches/{_quoted(batch)}"), as_json=as_json)


@batches.command()
@click.argument("batch", metavar="ID")
@options.url
@options.json
def cancel(batch: str, url: str | None, *, as_json: bool) -> None:
    """Cancel a batch. What was computed is kept.

    JSON: the batch, as in `batches show --json`.
    """
    _print(_client(url).request("POST", f"/v1/batches/{_quoted(batch)}/cancel"), as_json=as_json)


@batches.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", "output", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="OUT",
              help="File for the responses.")  # fmt: skip
@click.option("--errors", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="File for the requests that failed. Default: OUT with .errors.jsonl in place of its suffix.")  # fmt: skip
@click.option("--endpoint", metavar="PATH", help="Route of the requests. Default: that of the first line of FILE.")
@options.url
@options.progress
@options.json
def run(
    file: Path,
    output: Path,
    errors: Path | None,
    endpoint: str | None,
    url: str | None,
    progress: Mode,
    *,
    as_json: bool,
) -> None:
    """Upload FILE, wait for the answers, and write them to OUT.

    Each line of FILE is a request: {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input":
    "hello"}}. Ctrl-C ends the command, and the batch continues. The exit code is 1 if a request failed or was not
    answered.

    JSON: the batch at its end, as in `batches show --json`.
    """
    client = _client(url)
    task = _Run(client, file, endpoint or _first_endpoint(file))

    def work() -> dict[str, Any]:
        with show_progress(progress) as report:
            batch = task.wait(report)
        for field, path in (
            ("output_file_id", output),
            ("error_file_id", errors or output.with_suffix(".errors.jsonl")),
        ):
            if batch[field] is not None:
                _download(client, batch[field], path)
        return batch

    batch = run_until_interrupted(work, "the batch continues. To see it: emb-provider batches list")
    if batch["status"] == "failed":
        problems = [_problem(error) for error in batch["errors"]["data"][:_MAX_SHOWN_ERRORS]]
        raise ServerError(
            "\n".join([f"{batch['id']} was not started:", *problems]), exit_code=USAGE_ERROR, code="batch_failed"
        )
    _print(batch, as_json=as_json)
    counts = batch["request_counts"]
    if batch["status"] != "completed" or counts["failed"]:
        raise SystemExit(FAILED)


class _Run:
    """A file that is uploaded, and answered as a batch."""

    def __init__(self, client: ServerClient, file: Path, endpoint: str) -> None:
        self._client = client
        self._file = file
        self._endpoint = endpoint

    def wait(self, report: ProgressReporter) -> dict[str, Any]:
        """Return the batch when it has ended."""
        name = self._file.name
        with self._file.open("rb") as opened:
            counted = _CountedFile(opened, name, self._file.stat().st_size, report)
            uploaded = self._client.upload("/v1/files", name, cast("IO[bytes]", counted), {"purpose": "batch"})
        fields = {"input_file_id": uploaded["id"], "endpoint": self._endpoint, "completion_window": "24h"}
        batch = self._client.post("/v1/batches", fields)
        report.model(batch["id"])
        while (phase := _PHASES.get(batch["status"])) is not None:
            report(Progress(phase, batch["id"], step=_step(batch)))
            time.sleep(_POLL_S)
            batch = self._poll(batch["id"])
        return batch

    def _poll(self, identifier: str) -> dict[str, Any]:
        """Return the batch, also if the server does not answer for a while: it continues the batch after a restart."""
        deadline = time.monotonic() + _MAX_UNREACHABLE_S
        while True:
            try:
                return self._client.request("GET", f"/v1/batches/{identifier}")
            except ServerError as error:
                if error.exit_code != UNREACHABLE or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)


class _CountedFile:
    """A file whose reader's progress is shown."""

    def __init__(self, file: IO[bytes], name: str, size: int, report: ProgressReporter) -> None:
        self._file = file
        self._name, self._size, self._report = name, size, report

    def __iter__(self) -> _CountedFile:
        return self

    def __next__(self) -> bytes:
        if piece := self.read(64 * 1024):
            return piece
        raise StopIteration

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._report(Progress("upload", self._name, self._file.tell(), self._size))
        return piece

    def seek(self, offset: int, origin: int = 0) -> int:
        return self._file.seek(offset, origin)

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()


def _client(url: str | None) -> ServerClient:
    from emb_model_provider.cli.server_client import ServerClient

    return ServerClient(options.open_settings(), url, manages=False)


def _quoted(identifier: str) -> str:
    from urllib.parse import quote as quote_url

    return quote_url(identifier, safe="")


def _first_endpoint(file: Path) -> str:
    """Return the route of the first line; raise UsageError if it has none."""
    with file.open("rb") as opened:
        line = opened.readline(1_000_000)
    try:
        url = json.loads(line)["url"]
    except (ValueError, TypeError, KeyError):
        url = None
    if not isinstance(url, str):
        raise click.UsageError(
            f'The first line of {file} is not a request like {{"custom_id": "1", "method": "POST", "url": "/v1/embeddings", '
            f'"body": {{"input": "hello"}}}}: it begins with {quote(line[:60].decode("utf-8", "replace"))}.'
        )
    return url


def _download(client: ServerClient, identifier: str, path: Path) -> None:
    """Write a file of the server. An incomplete one has another name."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as opened:
        client.download(f"/v1/files/{identifier}/content", opened)
    part.replace(path)
    say(f"wrote {path}")


def _step(batch: dict[str, Any]) -> str:
    counts = batch["request_counts"]
    if not counts["total"]:
        return ""
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    paused = f", paused: {batch['pause_reason']}" if batch.get("pause_reason") else ""
    done = counts["completed"] + counts["failed"]
    return f"{done} of {counts['total']} requests, {done * 100 // counts['total']} %{failed}{paused}"


def _row(batch: dict[str, Any]) -> tuple[str, ...]:
    counts = batch["request_counts"]
    return (
        batch["id"],
        f"{batch['status']}, paused" if batch.get("pause_reason") else batch["status"],
        batch["endpoint"],
        f"{counts['completed'] + counts['failed']} of {counts['total']}",
        str(counts["failed"]),
        format_age(datetime.fromtimestamp(batch["created_at"], UTC)),
    )


def _print(batch: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(batch)
        return
    out(f"{batch['id']}: {batch['status']}")
    lines = [("requests", _step(batch) or "not counted yet"), ("endpoint", batch["endpoint"])]
    lines += [(name.removesuffix("_at"), _moment(batch[name])) for name in _TIMES if batch[name] is not None]
    files = ("input_file_id", "output_file_id", "error_file_id")
    lines += [(name.removesuffix("_file_id") + " file", batch[name]) for name in files if batch[name] is not None]
    lines += [("error", _problem(error)) for error in (batch["errors"] or {"data": ()})["data"][:_MAX_SHOWN_ERRORS]]
    out(pairs(lines))


def _problem(error: dict[str, Any]) -> str:
    return f"line {error['line']}: {error['message']}" if error["line"] is not None else str(error["message"])


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
