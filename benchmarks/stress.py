"""Stress test: models are loaded, unloaded, added, forgotten, downloaded and removed during requests to all of them.

The vectors of all responses are compared. Fewer models fit into memory than are requested, so that models are evicted, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np

from benchmarks import QUICK_HELP
from benchmarks.contenders import SERVICE_CACHE, Contender, Server, stop_servers_on_sigterm
from benchmarks.report import describe_run, format_number, log_progress, markdown_table
from benchmarks.resources import MemoryLog
from benchmarks.texts import Corpus
from emb_model_provider.model_spec import BUNDLED_MODEL
from tests.hubs.servers import HuggingFaceServer
from tests.models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Outcome = tuple[int, str]
"""Status of a response, and the code of its error; empty without an error."""

OK: Outcome = (200, "")
MIN_COSINE = 0.999
CONFIGURED = {
    "mean": {"name": BUNDLED_MODEL, "precision": "fp32"},
    "cls": {"name": BUNDLED_MODEL, "precision": "fp32", "pooling": "cls"},
    "torch": {"name": BUNDLED_MODEL, "precision": "fp32", "backend": "torch"},
}
"""Models of the settings: every request for them must be answered with vectors."""
REPOSITORY, ADDED = "acme/small", "added"
"""A repository on a local hub, and its alias while it is served."""
NOT_SERVED = {(404, "model_not_found"), (503, "model_not_ready")}
"""Further outcomes of requests for the added model, which is forgotten again and again."""
_MAX_LOADED = 2
_TIMEOUT_S = 300.0
_MAX_EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class Operation:
    """A request that manages models."""

    method: str
    path: str
    outcomes: frozenset[Outcome] = frozenset({OK})
    weight: float = 1.0


def _operations() -> dict[str, Operation]:
    load, unload = "/api/models/load?model_name=", "/api/models/unload?model_name="
    repository = f"{REPOSITORY}&source=huggingface"
    operations = {
        "list the served models": Operation("GET", "/api/models", weight=4.0),
        "list the models on disk": Operation("GET", "/api/models/cache/list", weight=2.0),
        "list as OpenAI does": Operation("GET", "/v1/models", weight=4.0),
        "add": Operation(
            "POST",
            f"{load}{repository}&alias={ADDED}",
            # It can be forgotten, and its files can be removed, while it is being loaded.
            frozenset({OK, *NOT_SERVED, (409, "model_in_use")}),
            weight=2.0,
        ),
        "forget": Operation("POST", f"{unload}{ADDED}&forget=true", frozenset({OK, *NOT_SERVED})),
        "download": Operation("POST", f"/api/models/download?model_name={repository}", frozenset({(202, "")})),
        "remove from disk": Operation(
            "DELETE",
            f"/api/models/cache/{REPOSITORY}",
            frozenset({OK, (404, "not_cached"), (409, "model_in_use")}),
            weight=0.5,
        ),
    }
    for alias in CONFIGURED:
        operations[f"load {alias}"] = Operation("POST", load + alias)
        operations[f"unload {alias}"] = Operation("POST", unload + alias)
    return operations


@dataclass(slots=True)
class Tally:
    """The outcomes of a run."""

    embeddings: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By alias and outcome."""
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By name and outcome."""
    wrong: int = 0
    unexpected: int = 0
    examples: list[str] = field(default_factory=list)

    def fail(self, example: str, *, is_wrong: bool = False) -> None:
        self.wrong += is_wrong
        self.unexpected += not is_wrong
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(example)
            log_progress(example)


class StressTest:
    """One run against one service."""

    def __init__(self, port: int, texts: Sequence[str], seed: int) -> None:
        self.tally = Tally()
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=_TIMEOUT_S,
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=30),
        )
        self._texts = texts
        self._random = random.Random(seed)  # noqa: S311 - repeatable on purpose
        self._vectors: dict[str, NDArray[np.float32]] = {}

    async def run(self, seconds: float, *, clients: int, managers: int) -> None:
        """Compute the references, then send requests and operations for a time."""
        added = await self._http.request("POST", _operations()["add"].path)
        if added.status_code != 200:
            raise RuntimeError(f"The model could not be added: {added.text}")
        for alias in (*CONFIGURED, ADDED):
            response = await self._embed(alias, range(len(self._texts)))
            if response.status_code != 200:
                raise RuntimeError(f"No reference for {alias}: {response.text}")
            self._vectors[alias] = _vectors(response)
            log_progress(f"references of {alias}: {len(self._texts)} texts")
        until = time.monotonic() + seconds
        await asyncio.gather(
            *(self._send_requests(until) for _ in range(clients)), *(self._manage(until) for _ in range(managers))
        )
        for alias in CONFIGURED:
            if (await self._embed(alias, [0])).status_code != 200:
                self.tally.fail(f"{alias} is not served at the end")
        await self._http.aclose()

    async def _send_requests(self, until: float) -> None:
        alias, left = "", 0
        while time.monotonic() < until:
            if not left:  # several for one model, because otherwise nearly every request would wait for a load
                alias, left = self._random.choice([*CONFIGURED, ADDED]), self._random.randint(1, 60)
            left -= 1
            rows = self._random.choices(range(len(self._texts)), k=self._random.choice([1, 1, 1, 4, 16]))
            if self._random.random() < 0.05:
                await self._disconnect(alias, rows)
                continue
            try:
                response = await self._embed(alias, rows)
            except httpx.HTTPError as error:
                self.tally.fail(f"embeddings of {alias}: {error!r}")
                continue
            outcome = _outcome(response)
            self.tally.embeddings[alias, _name(outcome)] += 1
            if outcome == OK:
                cosines = _cosines(_vectors(response), self._vectors[alias][rows])
                if cosines.min() < MIN_COSINE:
                    self.tally.fail(f"a vector of {alias} has a cosine of {cosines.min():.4f}", is_wrong=True)
            elif alias != ADDED or outcome not in NOT_SERVED:
                self.tally.fail(f"embeddings of {alias}: {response.status_code} {response.text[:300]}")
            else:
                await asyncio.sleep(0.02)

    async def _disconnect(self, alias: str, rows: Sequence[int]) -> None:
        """Send a request, and disconnect before most responses."""
        request = asyncio.create_task(self._embed(alias, rows))
        await asyncio.wait([request], timeout=self._random.uniform(0, 0.05))
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        self.tally.embeddings[alias, "aborted by the client"] += 1

    async def _manage(self, until: float) -> None:
        operations = _operations()
        weights = [operation.weight for operation in operations.values()]
        while time.monotonic() < until:
            name = self._random.choices(list(operations), weights)[0]
            operation = operations[name]
            try:
                response = await self._http.request(operation.method, operation.path)
            except httpx.HTTPError as error:
                self.tally.fail(f"{name}: {error!r}")
                continue
            outcome = _outcome(response)
            self.tally.operations[name, _name(outcome)] += 1
            if outcome not in operation.outcomes:
                self.tally.fail(f"{name}: {response.status_code} {response.text[:300]}")
            await asyncio.sleep(self._random.expovariate(2.0))

    async def _embed(self, alias: str, rows: Sequence[int]) -> httpx.Response:
        body = {"model": alias, "input": [self._texts[row] for row in rows]}
        return await self._http.post("/v1/embeddings", json=body)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    seconds = 5.0 if options.quick else 60.0 * options.minutes
    with tempfile.TemporaryDirectory(prefix="benchmarks-stress-") as directory:
        scratch = Path(directory)
        model = FAMILIES["bert-mean-normalize"](scratch / "model")
        files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
        with HuggingFaceServer({REPOSITORY: files}) as hub, Server(_contender(hub.url, scratch), scratch) as server:
            log_progress("starting the service; its first start compiles the models")
            server.wait()
            stress = StressTest(server.port, Corpus(options.seed).texts("short", 40), options.seed)
            memory = MemoryLog(lambda: server.pid)
            started = time.monotonic()
            asyncio.run(_run(stress, memory, seconds, options))
            elapsed_s = time.monotonic() - started
        print(_report(stress.tally, memory, elapsed_s, options))
    return 1 if stress.tally.wrong or stress.tally.unexpected else 0


async def _run(stress: StressTest, memory: MemoryLog, seconds: float, options: argparse.Namespace) -> None:
    sampling = asyncio.create_task(memory.run())
    await stress.run(seconds, clients=options.clients, managers=options.managers)
    sampling.cancel()


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stress", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="duration (default: %(default)g)")
    parser.add_argument("--clients", type=int, default=8, help="clients that embed (default: %(default)s)")
    parser.add_argument("--managers", type=int, default=4, help="clients that manage models (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _contender(hub: str, scratch: Path) -> Contender:
    settings = {
        "HOST": "127.0.0.1",
        "PORT": "{port}",
        "CACHE_DIR": str(SERVICE_CACHE),
        "HF_CACHE_DIR": str(scratch / "hub"),
        "HF_ENDPOINT": hub,
        "MODEL_MAPPING": json.dumps(CONFIGURED),
        "MAX_LOADED_MODELS": str(_MAX_LOADED),
        "LOAD_WAIT_S": f"{_TIMEOUT_S:g}",  # models are loaded one after the other
        "RESULT_CACHE_MB": "0",
        "REQUEST_TIMEOUT_S": f"{_TIMEOUT_S:g}",
    }
    environment = {f"EMB_PROVIDER_{name}": value for name, value in settings.items()}
    return Contender("stress", (sys.executable, "-m", "emb_model_provider.main"), environment, "/ready")


def _outcome(response: httpx.Response) -> Outcome:
    code = response.json()["error"]["code"] if response.status_code >= 400 else ""
    return response.status_code, code


def _name(outcome: Outcome) -> str:
    return " ".join(map(str, filter(None, outcome)))


def _vectors(response: httpx.Response) -> NDArray[np.float32]:
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


def _cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: NDArray[np.float32] = (left * right).sum(axis=1) / norms
    return cosines


def _report(tally: Tally, memory: MemoryLog, elapsed_s: float, options: argparse.Namespace) -> str:
    notes = [
        f"{options.clients} clients send requests for {len(CONFIGURED) + 1} models, of which {_MAX_LOADED} fit into memory, and "
        f"disconnect in 5 % of them; {options.managers} clients manage models",
        f"Every vector is compared with the vector of its text that the same service computed before: cosine above {MIN_COSINE}",
        f"The model `{ADDED}` is not served at times: then 404 `model_not_found` or 503 `model_not_ready` is expected",
    ]
    totals = [
        ["minutes", format_number(elapsed_s / 60)],
        ["requests for embeddings", f"{tally.embeddings.total():,}"],
        ["operations", f"{tally.operations.total():,}"],
        ["**wrong vectors**", f"{tally.wrong:,}"],
        ["**unexpected responses**", f"{tally.unexpected:,}"],
        ["highest resident memory, MiB", format_number(memory.highest())],
    ]
    parts = [
        "# Stress test",
        describe_run("benchmarks.stress", notes),
        "## Result",
        markdown_table(["", "count"], totals),
        "## Requests for embeddings",
        markdown_table(["Model, response", "count"], _rows(tally.embeddings)),
        "## Operations",
        markdown_table(["Operation, response", "count"], _rows(tally.operations)),
    ]
    if tally.examples:
        parts += ["## Errors", "\n".join(f"- {line}" for line in tally.examples)]
    return "\n\n".join(parts)


def _rows(counts: Counter[tuple[str, str]]) -> list[list[str]]:
    return [[f"{name}: {outcome}", f"{count:,}"] for (name, outcome), count in sorted(counts.items())]


if __name__ == "__main__":
    raise SystemExit(main())
