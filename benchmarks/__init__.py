"""Benchmarks of the service and of other embedding servers.

Programs: `python -m benchmarks.serve`, `.engine`, `.start`, `.fairness`, `.restart`, `.memory`, `.reuse`, `.rerank`, `.gpu`,
`.bulk`, `.ray_serve`, `.console`, `.hostile`, `.stress`, `.batch_kills` and `.soak`. Tables go to stdout, progress to stderr. Speed is never reported without
correctness: the vectors of every server are compared with those of sentence-transformers at fp32. The speed of a machine
drifts, so contenders alternate within each round, and ratios are taken within a round before their median is taken.
"""

from __future__ import annotations

from pathlib import Path

import platformdirs

ROOT = Path(__file__).resolve().parents[1]
"""The repository, which is the working directory of `python -m benchmarks.…`."""
CACHE = Path(platformdirs.user_cache_dir("emb_model_provider_benchmarks", appauthor=False))
"""Compiled and converted models, and the virtual environments of other servers."""
QUICK_HELP = "a short run that only shows that the benchmark works"
"""Help text of `--quick`."""
