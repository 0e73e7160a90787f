"""Helpers of the snapshots' tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMATS = Path(__file__).parents[1] / "data" / "formats"
"""Files that an earlier version has written, with `{root}` for their directory and `{endpoint}` for the hub."""
ENDPOINT = "http://127.0.0.1:1"


def read_sample(name: str, root: Path) -> Any:
    """Return a file that an earlier version has written, for another directory."""
    text = (FORMATS / name).read_text(encoding="utf-8")
    return json.loads(text.replace("{root}", str(root)).replace("{endpoint}", ENDPOINT))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
