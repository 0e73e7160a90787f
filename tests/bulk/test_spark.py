"""The example of docs/bulk.md runs with Spark.

PySpark is not among the tools of this project, because it has 450 MB: `uv run --with pyspark --with pandas pytest -m slow
tests/bulk/test_spark.py`. It also needs Java (`apt-get install default-jre-headless`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.docs.markdown import ROOT, blocks

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider import Embedder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pyspark") is None, reason="PySpark is not installed"),
    pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed"),
]

BEFORE = """
from pyspark.sql import SparkSession

spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
rows = [(str(number), f"text {number}") for number in range(20)]
documents = spark.createDataFrame(rows, "id string, text string").repartition(3)
"""


def test_spark(model: Path, embedder: Embedder, tmp_path: Path) -> None:
    """Each row has the vector of its text, whatever partition it is in."""
    import pyarrow.parquet as pq

    (example,) = (block for block in blocks(ROOT / "docs" / "bulk.md") if block.mark == "spark")
    name = '"sentence-transformers/all-MiniLM-L6-v2"'
    assert name in example.text
    script = tmp_path / "script.py"
    script.write_text(BEFORE + example.text.replace(name, repr(str(model))))
    environment = os.environ | {
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "EMB_PROVIDER_CACHE_DIR": str(tmp_path / "cache"),
        "EMB_PROVIDER_OFFLINE": "true",
    }
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, check=True, timeout=600)
    rows = pq.read_table(tmp_path / "vectors").to_pylist()
    assert sorted(row["id"] for row in rows) == sorted(str(number) for number in range(20))
    expected = embedder.embed([row["text"] for row in rows])
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)
