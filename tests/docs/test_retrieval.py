"""The programs of docs/retrieval.md find and rerank documents, with small models behind the names that they use."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.clients.isolated import Environment
from tests.docs.markdown import ROOT, blocks
from tests.kind_checks import densify, expected_bge_m3, expected_scores
from tests.kind_models import RERANKERS, save_bge_m3
from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.slow

PROGRAMS = [block.text for block in blocks(ROOT / "docs" / "retrieval.md") if block.mark == "hybrid"]
PRINT = """
import json
names = ("DOCUMENTS", "query", "found")
print(json.dumps({**{name: globals()[name] for name in names}, "results": answer.json()["results"]}))
"""
RERANKER = "BAAI/bge-reranker-v2-m3"
"""The model of the READMEs."""
LIMIT, SHOWN = 5, 3
"""Documents of each search, and of the merged list."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"bge-m3": save_bge_m3(root / "bge-m3"), "reranker": RERANKERS["bert"](root / "reranker")}


@pytest.fixture(scope="module")
def serving(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str
) -> Iterator[Service]:
    mapping: dict[str, dict[str, Any]] = {
        alias: {"name": f"test/{alias}", "path": str(directory), "precision": "fp32"}
        for alias, directory in models.items()
    }
    mapping["reranker"]["aliases"] = [RERANKER]
    settings = {"CACHE_DIR": service_cache, "BACKEND": backend, "MODEL_MAPPING": json.dumps(mapping)}
    with Service(tmp_path_factory.mktemp("retrieval"), **settings) as service:
        yield service.wait()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    # gRPC, by which Milvus Lite is reached, reads the name in lower case only.
    return Environment("hybrid", tmp_path_factory.mktemp("hybrid"), {"no_proxy": "localhost,127.0.0.1"})


@pytest.mark.parametrize(("number", "constant", "first_rank"), [(0, 60, 1), (1, 2, 0)], ids=["milvus", "qdrant"])
def test_program_finds_and_reranks(
    number: int, constant: int, first_rank: int, serving: Service, models: dict[str, Path], hybrid: Environment
) -> None:
    """The merged list is that of the reference vectors, by the formula of the database; the order that of CrossEncoder."""
    program = PROGRAMS[number].replace("http://localhost:9000", serving.url)
    done = subprocess.run(
        [hybrid.program("python"), "-c", program + PRINT],
        cwd=hybrid.directory,
        env=hybrid.variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *lines, last = done.stdout.splitlines()
    printed: dict[str, Any] = json.loads(last)
    documents, query, found = printed["DOCUMENTS"], printed["query"], printed["found"]

    expected = expected_bge_m3(models["bge-m3"], [*documents, query])
    width = 1 + max(int(vector.indices.max()) for vector in expected.sparse)
    merged: dict[int, float] = {}
    for vectors in (expected.dense, densify(expected.sparse, width)):
        for rank, index in enumerate(nearest(vectors)):
            merged[index] = merged.get(index, 0.0) + 1 / (constant + first_rank + rank)
    order = sorted(merged, key=lambda index: -merged[index])[:SHOWN]
    assert sorted(found) == sorted(documents[index] for index in order)

    scores = expected_scores(models["reranker"], [(query, text) for text in found])[:, 0]
    ranked = np.argsort(-scores).tolist()
    assert [result["index"] for result in printed["results"]] == ranked
    shown = [f"{1 / (1 + np.exp(-scores[index])):.3f}  {found[index]}" for index in ranked]
    assert lines == shown


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_request_of_the_readme(name: str, serving: Service, models: dict[str, Path]) -> None:
    """Its documents are returned in the order of CrossEncoder."""
    (command,) = (block.text for block in blocks(ROOT / name) if "/v1/rerank" in block.text)
    command = command.replace("http://localhost:9000", serving.url)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, check=True)
    request = json.loads(command.partition("-d '")[2].rpartition("'")[0])
    assert request["model"] == RERANKER
    scores = expected_scores(models["reranker"], [(request["query"], text) for text in request["documents"]])[:, 0]
    assert [result["index"] for result in json.loads(done.stdout)["results"]] == np.argsort(-scores).tolist()


def nearest(vectors: np.ndarray) -> Sequence[int]:
    """Return the rows that are nearest to the last one by dot product; rows without a common term are not found."""
    products = vectors[:-1] @ vectors[-1]
    return [index for index in np.argsort(-products).tolist()[:LIMIT] if products[index] != 0]
