"""Measurements of the service beside its peers: `python -m benchmarks.serve`, `.engine` and `.start`.

Tables go to stdout, progress to stderr. Speed is never shown without correctness: every contender's vectors are
compared with sentence-transformers at fp32. A machine's speed drifts, so contenders take turns within each round,
and ratios are taken within a round before their median is.
"""
