"""Where the benchmarks keep what they make: infinity's environment, compiled artifacts."""

from __future__ import annotations

from pathlib import Path

import platformdirs

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, from which `python -m benchmarks.…` is run."""
CACHE = Path(platformdirs.user_cache_dir("emb_model_provider_benchmarks", appauthor=False))
