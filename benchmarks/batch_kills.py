"""Kills workers of a batch with SIGKILL while they process it, and compares its files with those of an undisturbed run.

With `--service`, it kills the whole service, which serves the API and computes with a static model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks import QUICK_HELP, ROOT
from benchmarks.batch_worker import RECORD, open_batches
from benchmarks.bulk import write_model
from benchmarks.contenders import Contender, Server, stop_servers_on_sigterm
from benchmarks.postgresql import PostgreSQL, programs
from benchmarks.report import describe_run, format_number, log_progress, markdown_table
from emb_model_provider.batch_jobs.types import UNFINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from emb_model_provider.batch_jobs.batches import Batch, BatchStore

SQLITE, POSTGRESQL = "SQLite", "PostgreSQL"
WORKERS = 3
FAILING_EVERY = 97
"""Each such line is refused when it is computed, so that there is an error file."""
_TIMEOUT_S = 900.0
_KILLED_AT_START = 0.25
"""Share of the services that are killed before they are ready."""


class Workers:
    """Worker processes on one database."""

    def __init__(self, directory: Path, url: str | None, *, line_s: float = 0.001, **options: Any) -> None:
        """Create workers that need `line_s` seconds for a line, with the fields of `WorkerOptions`."""
        self._directory = directory
        self._arguments = {"directory": str(directory), "url": url, "line_s": line_s}
        self._options = options
        self._log = directory / "workers.log"
        self._record = directory / RECORD
        self._record.touch()
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, **options: Any) -> subprocess.Popen[bytes]:
        arguments = self._arguments | {"options": self._options | options}
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "benchmarks.batch_worker", json.dumps(arguments)]
            process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdin=subprocess.DEVNULL)
        self.running.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self.running.remove(process)

    def kill_all(self) -> None:
        for process in list(self.running):
            self.kill(process)

    def computed(self) -> Counter[str]:
        """Return how often each text was computed."""
        return Counter(line.partition(" ")[2] for line in self._lines())

    def by_process(self) -> Counter[int]:
        """Return how many texts each process computed."""
        return Counter(int(line.partition(" ")[0]) for line in self._lines())

    def log_text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _lines(self) -> list[str]:
        return self._record.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True, slots=True)
class Run:
    """A batch that was processed."""

    batch: Batch
    output: bytes
    errors: bytes
    computed: int
    """Lines, each time they were computed."""
    seconds: float

    @property
    def custom_ids(self) -> Counter[str]:
        """How often each custom_id is in the output or error file."""
        return Counter(json.loads(line)["custom_id"] for line in (*self.output.splitlines(), *self.errors.splitlines()))


def input_file(count: int) -> bytes:
    """Return an input file with lines whose custom_id is `id-0`, `id-1`, …"""
    lines = []
    for number in range(count):
        text = "too long" if number % FAILING_EVERY == 0 else f"text {number}"
        body = {"model": "m", "input": text}
        line = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/embeddings", "body": body}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines).encode()


def process_batch(
    directory: Path, url: str | None, content: bytes, kills: int, seed: int, *, line_s: float, chunk_inputs: int
) -> Run:
    """Process a file with several workers, of which one is killed and started again `kills` times, at random moments.

    The moments are points of the progress, so that all kills are before the end of the batch.
    """
    directory.mkdir(parents=True)
    store = open_batches(directory, url)
    batch = _create(store, content)
    count = content.count(b"\n")
    generator = random.Random(seed)  # noqa: S311 - no secret
    moments = sorted(generator.uniform(0, 0.97 * count) for _ in range(kills))
    workers = Workers(directory, url, line_s=line_s, chunk_inputs=chunk_inputs, poll_s=0.2)
    started = time.perf_counter()
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        for _ in range(WORKERS):
            workers.start()
        killed = 0
        while True:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the batch did not end: {store.get(None, batch.id)} {workers.log_text()[-2000:]}")
            if killed < kills:
                done = workers.by_process()
                victims = [process for process in workers.running if done[process.pid]]
                if victims and done.total() >= moments[killed]:
                    time.sleep(generator.uniform(0, 0.05))
                    workers.kill(generator.choice(victims))
                    workers.start()
                    killed += 1
                    if killed % 50 == 0:
                        log_progress(
                            f"{killed} of {kills} kills, {store.get(None, batch.id).completed} lines completed"
                        )
                    continue
            elif store.get(None, batch.id).state not in UNFINISHED:
                break
            time.sleep(0.005)
        seconds = time.perf_counter() - started
    finally:
        workers.kill_all()
    batch = store.get(None, batch.id)
    contents = [
        store.files.content(None, file_id).read_bytes() if file_id is not None else b""
        for file_id in (batch.output_file_id, batch.error_file_id)
    ]
    store.engine.dispose()
    return Run(batch, contents[0], contents[1], workers.computed().total(), seconds)


def serve_batch(scratch: Path, content: bytes, kills: int, seed: int) -> tuple[bytes, bytes, int, float]:
    """Process a file by services that are killed at random moments, the last one excepted.

    Returns the output file, the error file, the number of kills before the batch ended, and the seconds.
    """
    scratch.mkdir()
    environment = {
        "EMB_PROVIDER_HOST": "127.0.0.1", "EMB_PROVIDER_PORT": "{port}", "EMB_PROVIDER_RESULT_CACHE_MB": "0",
        "EMB_PROVIDER_CACHE_DIR": str(scratch / "cache"), "EMB_PROVIDER_MODEL_NAME": "static",
        "EMB_PROVIDER_MODEL_PATH": str(write_model(scratch / "model")),
    }  # fmt: skip
    contender = Contender("service", (sys.executable, "-m", "emb_model_provider.main"), environment, "/ready")
    generator = random.Random(seed)  # noqa: S311 - no secret
    started = time.perf_counter()
    with Server(contender, scratch / "first") as server:
        server.wait()
        with _client(server) as client:
            file = (
                client.post("/v1/files", data={"purpose": "batch"}, files={"file": content}).raise_for_status().json()
            )
            fields = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
            batch_id = client.post("/v1/batches", json=fields).raise_for_status().json()["id"]
            if kills:
                # The file is checked from its beginning by each service, so that they would make no progress before.
                while _poll(client, batch_id)["status"] == "validating":
                    time.sleep(0.05)
                time.sleep(generator.uniform(0, 1))
                server.kill()
    killed = min(1, kills)
    while True:
        with Server(contender, scratch / "next") as server:
            if killed < kills and generator.random() < _KILLED_AT_START:
                time.sleep(generator.uniform(0.2, 1.5))
                server.kill()
                killed += 1
                continue
            server.wait()
            with _client(server) as client:
                batch = _poll(client, batch_id)
                if killed < kills and batch["status"] != "completed":
                    time.sleep(generator.uniform(0, 1))
                    server.kill()
                    killed += 1
                    if killed % 25 == 0:
                        log_progress(f"{killed} of {kills} kills, {batch['request_counts']}")
                    continue
                while batch["status"] != "completed":
                    if time.perf_counter() - started > 4 * _TIMEOUT_S:
                        raise RuntimeError(f"the batch did not complete: {batch}")
                    time.sleep(0.2)
                    batch = _poll(client, batch_id)
                contents = [
                    client.get(f"/v1/files/{batch[name]}/content").raise_for_status().content if batch[name] else b""
                    for name in ("output_file_id", "error_file_id")
                ]
            return contents[0], contents[1], killed, time.perf_counter() - started


def _poll(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").raise_for_status().json()
    if batch["status"] not in (*UNFINISHED, "completed"):
        raise RuntimeError(f"the batch failed: {batch}")
    return batch


def _long_lines(count: int) -> bytes:
    """Return an input file with lines of about 600 tokens, of which every `FAILING_EVERY`th is refused."""
    lines = []
    for number in range(count):
        body: dict[str, Any] = {"input": f"{number} " + "some words of a text " * 120, "encoding_format": "base64"}
        if number % FAILING_EVERY == 0:
            body["dimensions"] = 7
        line = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/embeddings", "body": body}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines).encode()


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=600, trust_env=False)


def _kill_services(lines: int, kills: int, seed: int) -> int:
    """Print the table of killed services."""
    content = _long_lines(lines)
    with tempfile.TemporaryDirectory(prefix="benchmarks-batches-") as directory:
        undisturbed = serve_batch(Path(directory) / "undisturbed", content, 0, seed)
        log_progress(f"undisturbed: {undisturbed[3]:.0f} s")
        killed = serve_batch(Path(directory) / "killed", content, kills, seed)
    ids = Counter(json.loads(line)["custom_id"] for part in killed[:2] for line in part.splitlines())
    is_once = ids == Counter(f"id-{number}" for number in range(lines))
    same = [a == b for a, b in zip(undisturbed[:2], killed[:2], strict=True)]
    head = ["lines", "kills", "undisturbed, s", "with kills, s", "custom_ids exactly once", "output identical",
            "errors identical"]  # fmt: skip
    row = [
        f"{lines:,}", str(killed[2]), *map(format_number, (undisturbed[3], killed[3])),
        *("yes" if each else "**no**" for each in (is_once, *same)),
    ]  # fmt: skip
    notes = [
        "each kill is a SIGKILL to the service, after it has checked the file; of every fourth one before it is ready, of the others "
        "up to a second later; the next one is started at once",
        f"static embeddings with random weights; lines of about 600 tokens; every {FAILING_EVERY}th line is refused; SQLite",
    ]
    print("\n\n".join(["# Batches", describe_run("benchmarks.batch_kills", notes), "## Killed services",
                       markdown_table(head, [row])]))  # fmt: skip
    return 0 if is_once and all(same) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    if options.service:
        lines, kills = (300, 3) if options.quick else (options.lines, options.kills)
        return _kill_services(lines, kills, options.seed)
    lines, kills, chunk = (300, 3, 32) if options.quick else (options.lines, options.kills, options.chunk)
    rows, is_correct = [], True
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmarks-batches-")))
        for name, server in stack.enter_context(_databases(scratch)):
            runs = []
            for number in (0, kills):
                url = server.create_schema() if server is not None else None
                log_progress(f"{name}: {lines} lines, {number} kills")
                directory = scratch / f"{name}-{number}"
                run = process_batch(
                    directory, url, input_file(lines), number, options.seed, line_s=options.line_s, chunk_inputs=chunk
                )
                log_progress(f"{name}: {run.batch.state} after {run.seconds:.0f} s")
                runs.append(run)
            row, is_row_correct = _compare(name, lines, kills, chunk, *runs)
            rows.append(row)
            is_correct = is_correct and is_row_correct
    head = [
        "database", "lines", "kills", "undisturbed, s", "with kills, s", "custom_ids exactly once",
        "output identical", "errors identical", "computed again", "per kill", "at most",
    ]  # fmt: skip
    notes = [
        f"{WORKERS} worker processes; a line takes {1000 * options.line_s:g} ms, one after the other in each process; chunks of "
        f"{chunk} lines, 2 at a time in each process; every {FAILING_EVERY}th line is refused",
        "each kill is a SIGKILL to a process that has computed lines, at a random moment; another process is started at once",
    ]
    title = "## Killed workers\n\n`computed again` counts lines; `at most` is kills × 2 chunks."
    print("\n\n".join(["# Batches", describe_run("benchmarks.batch_kills", notes), title, markdown_table(head, rows)]))
    return 0 if is_correct else 1


def _create(store: BatchStore, content: bytes) -> Batch:
    with store.files.upload("", "input.jsonl") as upload:
        upload.write(content)
        file = upload.commit()
    return store.create("", input_file_id=file.id, endpoint="/v1/embeddings")


@contextmanager
def _databases(scratch: Path) -> Iterator[list[tuple[str, PostgreSQL | None]]]:
    """Yield SQLite, and a PostgreSQL server if its programs are installed."""
    if programs() is None:
        log_progress("PostgreSQL is not installed")
        yield [(SQLITE, None)]
        return
    scratch.chmod(0o755)  # for the user of the server
    with PostgreSQL(scratch / "postgresql") as server:
        yield [(SQLITE, None), (POSTGRESQL, server)]


def _compare(name: str, lines: int, kills: int, chunk: int, undisturbed: Run, killed: Run) -> tuple[list[str], bool]:
    """Return a row of the table, and whether it is as it must be."""
    expected = Counter(f"id-{number}" for number in range(lines))
    is_once = killed.custom_ids == expected == undisturbed.custom_ids
    is_same = [
        _digest(a) == _digest(b) for a, b in ((undisturbed.output, killed.output), (undisturbed.errors, killed.errors))
    ]
    again, limit = killed.computed - lines, kills * 2 * chunk
    row = [
        name,
        f"{lines:,}",
        str(kills),
        format_number(undisturbed.seconds),
        format_number(killed.seconds),
        "yes" if is_once else "**no**",
        *("yes" if same else "**no**" for same in is_same),
        f"{again:,}",
        format_number(again / kills),
        f"{limit:,}",
    ]
    return row, is_once and all(is_same) and 0 <= again <= limit and undisturbed.computed == lines


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_kills", description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000, help="(default: %(default)s)")
    parser.add_argument("--kills", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="lines of a chunk (default: %(default)s)")
    parser.add_argument("--line-s", type=float, default=0.002, help="seconds for a line (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=19, help="of the moments (default: %(default)s)")
    parser.add_argument("--service", action="store_true", help="kill the whole service instead of workers")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
