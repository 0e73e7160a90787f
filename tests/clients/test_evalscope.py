"""EvalScope: `evalscope perf` measures embeddings and reranking as docs/performance.md shows."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.helpers import KEY
from tests.clients.isolated import Environment
from tests.kind_models import RERANKERS
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

REQUESTS = 12


@pytest.fixture(scope="module")
def evalscope(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment("evalscope", tmp_path_factory.mktemp("evalscope"), {})


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service with the bundled model and a reranker."""
    reranker = RERANKERS["bert"](tmp_path_factory.mktemp("reranker") / "model")
    mapping = {"mini": {"name": BUNDLED}, "reranker": {"name": "test/reranker", "path": str(reranker)}}
    settings = {"CACHE_DIR": service_cache, "BACKEND": backend, "MODEL_MAPPING": json.dumps(mapping), "API_KEYS": KEY}
    with Service(tmp_path_factory.mktemp("service"), **settings) as started:
        yield started.wait()


def test_embeddings(evalscope: Environment, service: Service, tmp_path: Path) -> None:
    """All requests succeed, and EvalScope counts the tokens that the service reports."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"text number {number}\n" for number in range(REQUESTS)), encoding="utf-8")
    summary = _run(evalscope, service, tmp_path, "mini", "openai_embedding", "embedding", texts)
    assert _counts(summary) == (REQUESTS, REQUESTS, 0)
    assert summary["Avg Input Tokens"] == 5  # [CLS] text number N [SEP]


def test_rerank(evalscope: Environment, service: Service, tmp_path: Path) -> None:
    """All requests succeed. EvalScope uses the path `/v1/reranks`."""
    lines = tmp_path / "pairs.jsonl"
    pairs = [{"query": f"query {number}", "documents": ["one document", "another"]} for number in range(REQUESTS)]
    lines.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    summary = _run(evalscope, service, tmp_path, "reranker", "openai_rerank", "rerank", lines)
    assert _counts(summary) == (REQUESTS, REQUESTS, 0)


def _run(
    evalscope: Environment, service: Service, outputs: Path, model: str, api: str, dataset: str, path: Path
) -> dict[str, Any]:
    """Return the summary that EvalScope writes."""
    run = subprocess.run(
        [
            evalscope.program("evalscope"), "perf", "--url", f"{service.url}/v1", "--api", api, "--model", model,
            "--api-key", KEY, "--dataset", dataset, "--dataset-path", path, "--parallel", "4",
            "--number", str(REQUESTS), "--outputs-dir", outputs,
        ],
        cwd=outputs,
        env=evalscope.variables,
        capture_output=True,
        text=True,
        timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    (file,) = outputs.rglob("benchmark_summary.json")
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return summary


def _counts(summary: dict[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of requests: all, successful and failed."""
    return summary["Total Requests"], summary["Success Requests"], summary["Failed Requests"]
