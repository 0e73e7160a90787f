"""Measures models on a GPU: correctness and throughput by precision, packing, batch policy and streams. At most 8 minutes.

`python -m benchmarks.gpu` needs nothing but the installed packages: the weights are random, of the sizes of well-known
models, besides the bundled model. Each variant is compared with fp32 on the same device. It also runs on a CPU, where packed
attention is computed input by input, so that only the program itself is tested there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import QUICK_HELP
from benchmarks.report import NONE, describe_run, format_number, log_progress, markdown_table
from benchmarks.texts import Corpus, describe_texts
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.hubs.local import find_bundled
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.serving.batcher import Batch, Batcher, BatchJob
from emb_model_provider.serving.config import EngineConfig, batch_policy
from emb_model_provider.serving.engine import EmbedOptions, Engine
from emb_model_provider.settings import BatchSettings, HubSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import TokenBatch
    from emb_model_provider.snapshots.snapshot import Snapshot

_BUNDLED = "MiniLM-L6 (trained)"
_LONG = "long"
_KINDS = ("short", "doc", _LONG)
_ABOUT_LONG = "long: six documents in one text, cut at the longest input of the model"
_SPREAD = 0.06
"""Standard deviation of the random weights: with the usual 0.02 all texts would have nearly the same vector."""


@dataclass(frozen=True, slots=True)
class Size:
    """The architecture of a model."""

    family: str
    """Beginning of the names of its classes in transformers."""
    width: int
    layers: int
    heads: int
    inner: int
    options: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "BERT base": Size("Bert", 768, 12, 12, 3072),
    "XLM-RoBERTa large": Size("XLMRoberta", 1024, 24, 16, 4096, {"type_vocab_size": 1}),
    "ModernBERT base": Size("ModernBert", 768, 22, 12, 1152),
    "Qwen3 0.6B": Size("Qwen3", 1024, 28, 16, 3072, {"num_key_value_heads": 8, "head_dim": 128}),
}
TINY = {"width": 64, "layers": 2, "heads": 4, "inner": 128}
_TINY_OPTIONS = {"num_key_value_heads": 2, "head_dim": 16}


@dataclass(frozen=True, slots=True)
class Variant:
    """How a backend runs a model."""

    name: str
    precision: str
    packs: bool


VARIANTS = (
    Variant("packed fp16", "fp16", packs=True),
    Variant("packed bf16", "bf16", packs=True),
    Variant("padded fp16", "fp16", packs=False),
    Variant("padded fp32", "fp32", packs=False),
)


POLICIES = {
    "padded": (VARIANTS[2], False, 1),
    "packed, in batches as if padded": (VARIANTS[0], False, 1),
    "packed": (VARIANTS[0], True, 1),
    "packed, 2 streams": (VARIANTS[0], True, 2),
}
"""How the engine runs: variant of the backend, whether batches cost their tokens, and streams."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a variant does with a kind of texts."""

    model: str
    kind: str
    variant: str
    tokens_per_s: float | None = None
    share: float | None = None
    """Of the rate of matrix products of the device."""
    cosine: float | None = None
    """The lowest one to fp32."""
    batch_tokens: float | None = None
    """Median tokens of a batch."""
    note: str = ""


class Deadline:
    """Ends the measurements in time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._end


@dataclass(frozen=True, slots=True)
class Options:
    device: str
    seconds: float
    """Of one measurement."""
    tokens: int
    """Tokens of the texts of one pass."""
    quick: bool


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parse_options(arguments)
    device = parsed.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    options = Options(device, 0.02, 300, quick=True) if parsed.quick else Options(device, 0.7, 160_000, quick=False)
    deadline = Deadline(parsed.seconds)
    peak = _measure_products(options)
    cells: list[Cell] = []
    served: list[list[str]] = []
    with tempfile.TemporaryDirectory() as root:
        for name, directory in _models(Path(root), options, parsed.models):
            if not deadline.allows(30 * options.seconds):
                log_progress(f"no time is left for {name}")
                cells.append(Cell(name, NONE, NONE, note="not measured: no time was left"))
                continue
            log_progress(name)
            cells += _measure_model(name, directory, options, deadline, peak)
            if name in (_BUNDLED, "BERT base"):
                served += _measure_served(name, directory, options, deadline)
            _free()
    print(_report(cells, served, options, peak))
    return 0


# --- models -----------------------------------------------------------------------------------------------


def _models(root: Path, options: Options, only: str | None) -> Iterator[tuple[str, Path]]:
    """Yield the name and the directory of each model. A directory is removed when the next one is made."""
    wanted = [name.strip() for name in only.split(",")] if only else [_BUNDLED, *SIZES]
    for name in wanted:
        if name == _BUNDLED:
            yield name, find_bundled()
            continue
        directory = root / name.replace(" ", "-")
        write_model(directory, SIZES[name], tiny=options.quick, device=options.device)
        yield name, directory
        shutil.rmtree(directory)


def write_model(directory: Path, size: Size, *, tiny: bool, device: str) -> None:
    """Write a model with random weights and the tokenizer of the bundled model."""
    vocabulary = len((find_bundled() / "vocab.txt").read_text(encoding="utf-8").splitlines())
    shape = TINY if tiny else {"width": size.width, "layers": size.layers, "heads": size.heads, "inner": size.inner}
    extra = {name: _TINY_OPTIONS.get(name, value) if tiny else value for name, value in size.options.items()}
    # Imported here, because the import of the torch backend above silences what these would print.
    import transformers

    config = getattr(transformers, f"{size.family}Config")(
        vocab_size=vocabulary,
        hidden_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["inner"],
        max_position_embeddings=514,
        initializer_range=0.3 if tiny else _SPREAD,
        pad_token_id=0, bos_token_id=101, eos_token_id=102, cls_token_id=101, sep_token_id=102,
        **extra,
    )  # fmt: skip
    torch.manual_seed(5)
    with torch.device(device):
        model = getattr(transformers, f"{size.family}Model")(config)
    model.save_pretrained(directory)
    for path in find_bundled().iterdir():
        if path.name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(path, directory)
    package = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{package}.Pooling"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512}), encoding="utf-8")
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": shape["width"], "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")


def _spec(directory: Path, precision: str, device: str) -> ModelSpec:
    return ModelSpec(
        alias="measured",
        name=str(directory),
        path=directory,
        source="local",
        backend="torch",
        precision=precision,  # type: ignore[arg-type]  # one of VARIANTS
        device=device,
    )


def _load(directory: Path, variant: Variant, device: str) -> TorchBackend:
    spec = _spec(directory, variant.precision, device)
    backend = TorchBackend(spec, _snapshot(spec), trust_remote_code=False)
    if not variant.packs:
        backend.unpack()
    elif not backend.packs:
        backend.pack(_attend_one_by_one if device == "cpu" else _refuse)
    return backend


def _snapshot(spec: ModelSpec) -> Snapshot:
    cache = Path(tempfile.gettempdir()) / "emb_model_provider_benchmarks_gpu"
    return fetch_snapshot(spec, HubSettings(cache_dir=cache, offline=True))


def _refuse(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("this device or this version of PyTorch does not support packing")


def _attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    _longest: int,
    *,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Compute attention as `varlen_kernel`, slowly, and on any device."""
    rows = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        positions = torch.arange(end - start)
        back = positions[:, None] - positions[None, :]
        left, right = (end if side < 0 else side for side in window)
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=(back <= left) & (-back <= right), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        rows.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(rows)


# --- batches ----------------------------------------------------------------------------------------------


def _texts(kind: str, tokens: int) -> list[str]:
    """Return different texts with about this number of tokens in all."""
    corpus, means = Corpus(), {"short": 13, "doc": 92, _LONG: 500}
    count = max(4, tokens // means[kind])
    if kind == _LONG:
        parts = corpus.texts("doc", 6 * count)
        return [" ".join(parts[start : start + 6]) for start in range(0, len(parts), 6)]
    return corpus.texts(kind, count)  # type: ignore[arg-type]  # one of its kinds


def _measure_model(name: str, directory: Path, options: Options, deadline: Deadline, peak: float) -> list[Cell]:
    cells: list[Cell] = []
    texts = {kind: _texts(kind, options.tokens) for kind in _KINDS}
    expected: dict[str, NDArray[np.float32]] = {}
    with _loaded(directory, VARIANTS[-1], options.device) as backend:
        weights = _matrix_items(backend)
        for kind, each in texts.items():
            expected[kind] = _embed(backend, _encode(backend, each[: _compared(kind)]))
    for variant in VARIANTS:
        try:
            with _loaded(directory, variant, options.device) as backend:
                for kind, each in texts.items():
                    cells.append(_measure(name, kind, variant, backend, each, expected[kind], weights, options, peak))
                    if not deadline.allows(10 * options.seconds):
                        return cells
        except Exception as error:  # noqa: BLE001 - one variant that fails must not end the others
            log_progress(f"{name}, {variant.name}: {error!r}")
            cells.append(Cell(name, NONE, variant.name, note=f"{type(error).__name__}: {str(error)[:100]}"))
        _free()
    for kind, each in texts.items():
        if deadline.allows(10 * options.seconds):
            cells.append(_measure_reference(name, kind, directory, each, expected[kind], weights, options, peak))
    return cells


def _compared(kind: str) -> int:
    return {"short": 200, "doc": 100}.get(kind, 24)


@contextlib.contextmanager
def _loaded(directory: Path, variant: Variant, device: str) -> Iterator[TorchBackend]:
    backend = _load(directory, variant, device)
    try:
        yield backend
    finally:
        backend.close()


def _measure(
    name: str,
    kind: str,
    variant: Variant,
    backend: TorchBackend,
    texts: Sequence[str],
    expected: NDArray[np.float32],
    weights: int,
    options: Options,
    peak: float,
) -> Cell:
    if variant.packs and not backend.packs:
        return Cell(name, kind, variant.name, note="; ".join(backend.description.notes) or "not packed")
    encoded = _encode(backend, texts)
    batches = _batches(backend, encoded)
    cosine = _lowest_cosine(_embed(backend, encoded.select(range(len(expected)))), expected)
    tokens = sum(len(ids) for batch in batches for ids in batch.ids)
    rate = tokens / _time(lambda: [backend.run(batch) for batch in batches], options.seconds)
    sizes = [sum(map(len, batch.ids)) for batch in batches]
    share = 2 * weights * rate / peak
    return Cell(name, kind, variant.name, rate, share, cosine, statistics.median(sizes))


def _measure_reference(
    name: str,
    kind: str,
    directory: Path,
    texts: Sequence[str],
    expected: NDArray[np.float32],
    weights: int,
    options: Options,
    peak: float,
) -> Cell:
    """Measure sentence-transformers at fp16, with its default of 32 texts, sorted by length."""
    from sentence_transformers import SentenceTransformer

    try:
        half = torch.float16 if options.device != "cpu" else torch.bfloat16
        model = SentenceTransformer(
            str(directory), device=options.device, local_files_only=True, model_kwargs={"dtype": half}
        )
        vectors = model.encode(list(texts[: len(expected)]), show_progress_bar=False)
        length = model.max_seq_length or 512
        tokens = sum(min(len(ids), length) for ids in model.tokenizer(list(texts))["input_ids"])
        rate = tokens / _time(lambda: model.encode(list(texts), show_progress_bar=False), options.seconds)
    except Exception as error:  # noqa: BLE001 - likewise
        return Cell(name, kind, "sentence-transformers", note=f"{type(error).__name__}: {str(error)[:100]}")
    cosine = _lowest_cosine(np.asarray(vectors, dtype=np.float32), expected)
    return Cell(name, kind, "sentence-transformers", rate, 2 * weights * rate / peak, cosine, note="with its tokenizer")


def _encode(backend: TorchBackend, texts: Sequence[str]) -> TokenBatch:
    return Tokenization(backend.description).encode(list(texts), truncate="END").batch()


def _batches(backend: TorchBackend, encoded: TokenBatch) -> list[TokenBatch]:
    """Return the batches that the service would form of waiting requests of 32 texts."""
    batcher: Batcher[BatchJob] = Batcher(batch_policy(BatchSettings(), backend.description))
    owners: dict[int, int] = {}
    for start in range(0, len(encoded.ids), 32):
        job = BatchJob(encoded.ids[start : start + 32])
        owners[id(job)] = start
        batcher.submit(job)
    batches = []
    while isinstance(batch := batcher.next_batch(0.0, may_wait=False), Batch):
        batches.append(encoded.select([owners[id(job)] + row for job, row in batch.members]))
    return batches


def _embed(backend: TorchBackend, encoded: TokenBatch) -> NDArray[np.float32]:
    parts = [
        backend.run(encoded.select(range(start, min(start + 16, len(encoded.ids))))).dense
        for start in range(0, len(encoded.ids), 16)
    ]
    return np.concatenate([part for part in parts if part is not None])


def _matrix_items(backend: TorchBackend) -> int:
    """Return the number of weights that each token is multiplied with."""
    pipeline = backend._pipeline
    linear = torch.nn.Linear
    return sum(each.weight.numel() for each in pipeline.modules() if isinstance(each, linear)) if pipeline else 0


def _lowest_cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    a, b = left.astype(np.float64), right.astype(np.float64)
    return float(((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min())


def _time(work: Callable[[], object], seconds: float) -> float:
    """Return the median time of a call, after one that warms up."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _measure_products(options: Options) -> float:
    """Return the rate of matrix products of the device at 16 bits, in operations per second."""
    size = 256 if options.device == "cpu" else 8192
    kind = torch.float32 if options.device == "cpu" else torch.float16
    left, right = (torch.randn(size, size, device=options.device, dtype=kind) for _ in range(2))

    def multiply() -> None:
        for _ in range(4):
            torch.mm(left, right)
        if options.device != "cpu":
            torch.cuda.synchronize()

    return 4 * 2 * size**3 / _time(multiply, options.seconds)


# --- as served --------------------------------------------------------------------------------------------


def _measure_served(name: str, directory: Path, options: Options, deadline: Deadline) -> list[list[str]]:
    """Measure the engine of the service: tokenizer, scheduler and backend, without HTTP."""
    rows = []
    tasks = 2 if options.quick else 16
    for kind, size, clients in (("short", 1, 4 * tasks), ("short", 32, tasks), ("doc", 32, tasks)):
        for policy, (variant, packs, streams) in POLICIES.items():
            if not deadline.allows(8 * options.seconds):
                return rows
            load = _loader(directory, variant, options.device, packs=packs, streams=streams)
            rate, batches, median = asyncio.run(_serve(directory, load, options, kind, size, clients))
            rows.append(
                [
                    name,
                    f"{size} {kind}, {clients} clients",
                    policy,
                    format_number(rate / 1e6),
                    format_number(batches),
                    format_number(median),
                ]
            )
    return rows


def _loader(directory: Path, variant: Variant, device: str, *, packs: bool, streams: int) -> Callable[[], TorchBackend]:
    """Return a function that loads a backend with the policy for packed batches or the one for padded batches."""

    def load() -> TorchBackend:
        backend = _load(directory, variant, device)
        backend.streams = streams
        backend.description = replace(backend.description, packs=packs)
        return backend

    return load


async def _serve(
    directory: Path, load: Callable[[], TorchBackend], options: Options, kind: str, size: int, clients: int
) -> tuple[float, float, float]:
    """Return tokens per second, batches per second, and the median tokens of a batch."""
    sizes: list[int] = []
    lock = threading.Lock()

    def record(batch: Any) -> None:
        with lock:
            sizes.append(batch.tokens)

    corpus = Corpus(seed=11)
    pool = corpus.texts(kind, size * (8 if options.quick else 64))  # type: ignore[arg-type]  # one of its kinds
    with ThreadPoolExecutor(8) as executor:
        spec = _spec(directory, "fp16", options.device)
        engine = Engine(spec, load, EngineConfig(on_batch=record), executor, lambda _change, _reason: None)
        await engine.start()
        try:
            end = time.perf_counter() + options.seconds

            async def call(number: int) -> int:
                tokens = 0
                place = number
                while True:
                    start = place * size % len(pool)
                    tokens += (await engine.embed(pool[start : start + size], EmbedOptions())).tokens
                    place += clients
                    if time.perf_counter() >= end:
                        return tokens

            await asyncio.gather(*(call(number) for number in range(clients)))  # warms up
            sizes.clear()
            started = time.perf_counter()
            end = started + 2 * options.seconds
            tokens = sum(await asyncio.gather(*(call(number) for number in range(clients))))
            took = time.perf_counter() - started
        finally:
            await asyncio.to_thread(engine.stop)
    return tokens / took, len(sizes) / took, statistics.median(sizes)


# --- the report -------------------------------------------------------------------------------------------


def _report(cells: Sequence[Cell], served: Sequence[Sequence[str]], options: Options, peak: float) -> str:
    head = ["model", "texts", "variant", "cosine", "Mtokens/s", "of products", "tokens of a batch", "note"]
    rows = [
        [
            cell.model,
            cell.kind,
            cell.variant,
            NONE if cell.cosine is None else f"{cell.cosine:.6f}",
            NONE if cell.tokens_per_s is None else format_number(cell.tokens_per_s / 1e6),
            NONE if cell.share is None else f"{cell.share:.1%}",
            NONE if cell.batch_tokens is None else format_number(cell.batch_tokens),
            cell.note.replace("|", "/"),
        ]
        for cell in cells
    ]
    served_head = ["model", "requests", "how", "Mtokens/s", "batches/s", "tokens of a batch"]
    name = (
        torch.cuda.get_device_name(options.device)
        if options.device != "cpu"
        else "a CPU, for a test of the program only"
    )
    notes = [
        f"Device: {name}; CUDA {torch.version.cuda}; matrix products {peak / 1e12:.3g} TFLOP/s",
        *describe_texts("short", "doc"),
        _ABOUT_LONG,
        "Cosine: the lowest one to the padded backend at fp32 on the same device. Weights are random, except for those of "
        f"{_BUNDLED}. Share of products: of linear layers only, without attention",
        "Backend: token ids to vectors on the host, batches as the service forms them, one after the other. As served: "
        "texts to vectors, without HTTP, at fp16",
    ]
    return (
        f"## The backend\n\n{markdown_table(head, rows)}\n\n## As served\n\n{markdown_table(served_head, served)}\n\n"
        f"{describe_run('benchmarks.gpu', notes)}"
    )


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=450.0, help="of all measurements (default: %(default)s)")
    parser.add_argument("--device", help="cpu, or cuda:N (default: cuda:0 if there is one)")
    parser.add_argument("--models", help=f"separated by commas (default: {_BUNDLED}, {', '.join(SIZES)})")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
