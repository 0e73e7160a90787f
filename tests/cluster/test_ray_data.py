"""The example of docs/bulk.md for Ray Data, with Ray."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest

from emb_model_provider import Embedder
from emb_model_provider.settings import Settings
from tests.docs.markdown import ROOT, blocks

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clients.isolated import Environment

pytestmark = pytest.mark.slow

INIT = 'import ray\nray.init(address="local", num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False)\n'
"""Before the example, which would use the whole machine. The actors occupy two of the processors, which are only counted."""


def test_actors_embed_a_dataset(ray: Environment, service_cache: str, tmp_path: Path) -> None:
    """Two actors together have the vectors of all rows."""
    (example,) = (block for block in blocks(ROOT / "docs" / "bulk.md") if block.mark == "ray")
    rows = [{"id": f"doc-{number}", "text": f"the document number {number}"} for number in range(600)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = INIT + example.text.replace("batch_size=1024", "batch_size=100")
    done = subprocess.run(
        [ray.program("python"), "-c", text],
        cwd=tmp_path,
        env=ray.variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    tables = [pq.read_table(path).to_pylist() for path in (tmp_path / "vectors").glob("*.parquet")]
    found = {row["id"]: row["embedding"] for table in tables for row in table}
    assert len(found) == sum(map(len, tables)) == len(rows)
    with Embedder(settings=Settings.from_values(cache_dir=service_cache, offline=True)) as embedder:
        vectors = embedder.embed([row["text"] for row in rows])
    stored = np.array([found[row["id"]] for row in rows], dtype=np.float32)
    assert (stored * vectors).sum(1).min() > 0.999
