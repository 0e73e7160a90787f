"""The torch backend on a CPU: precisions, recomputation at fp32, and invalid tokens."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.pytorch import backend as backend_module
from emb_model_provider.backends.pytorch.pipeline import lowest_capability
from emb_model_provider.errors import DeviceUnavailableError, InferenceError
from tests.backends.helpers import TEXTS, cosines, embed_texts, load_torch, reference, reference_kernel
from tests.backends.small_tokenizers import wordpiece
from tests.models import bert, bundled_directory, save_bare

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_an_error(tmp_path: Path) -> None:
    """The message names the flag and the setting."""
    with pytest.raises(DeviceUnavailableError, match=r"Device cuda: .*`--device`, or EMB_PROVIDER_DEVICE"):
        load_torch(tmp_path, device="cuda")


@pytest.mark.parametrize(
    ("architectures", "lowest"),
    [(["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], (7, 5)), (["sm_100a", "sm_90a"], (9, 0)), ([], (0, 0))],
)
def test_the_kernels_of_a_build_say_which_devices_it_supports(
    architectures: list[str], lowest: tuple[int, int]
) -> None:
    assert lowest_capability(architectures) == lowest


# --- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.99), ("fp16", 0.9999)])
def test_the_bundled_model_at_half_precision_is_close_to_fp32(precision: str, bound: float) -> None:
    """The vectors are float32."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load_torch(bundled_directory(), precision=precision)
    vectors = embed_texts(backend, texts)
    assert vectors.dtype == np.float32
    assert backend.description.precision == precision
    assert bound <= cosines(vectors, expected).min() < 1 - 1e-9


# Rounding has more effect on the wide random weights of the small models than on trained weights.
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.98), ("fp16", 0.999)])
@pytest.mark.parametrize("family", ["bert-dense", "xlm-roberta", "mpnet", "modernbert", "qwen3-left"])
def test_families_at_half_precision_are_close_to_fp32(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    expected = embed_texts(load_torch(family_directory(family)), TEXTS)
    vectors = embed_texts(load_torch(family_directory(family), precision=precision), TEXTS)
    assert bound <= cosines(vectors, expected).min() < 1 - 1e-9


def test_embed_fp32_is_finite_for_an_input_that_overflows_fp16(
    family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two rows of the embeddings add up to more than fp16 can represent. `embed` is unchanged afterwards."""
    directory = tmp_path / "large"
    shutil.copytree(family_directory("bert-mean-normalize"), directory)
    (weights,) = directory.rglob("*.safetensors")
    tensors = load_file(weights)
    tensors[_named(tensors, "word_embeddings.weight")][7] = 60_000
    tensors[_named(tensors, "position_embeddings.weight")][2] = 60_000
    save_file(tensors, weights, metadata={"format": "pt"})
    batch = TokenBatch(ids=[[2, 5, 7, 3], [2, 7, 5, 3]], prompt_lengths=[0, 0])
    expected = load_torch(directory).run(batch).dense
    backend = load_torch(directory, precision="fp16")
    finite = np.isfinite(backend.run(batch).dense).all(axis=1)
    assert finite.tolist() == [False, True]
    for _ in range(2):  # the second time, the copy of the weights is there
        assert cosines(backend.run_fp32(batch).dense, expected).min() > 0.999
    assert np.isfinite(backend.run(batch).dense).all(axis=1).tolist() == finite.tolist()


def test_the_copy_at_fp32_is_kept_for_some_minutes(
    family_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made once, by whichever thread needs it first, and freed by a later batch. The tokenizer is not copied."""
    backend = load_torch(family_directory("bert-mean-normalize"), precision="fp16")
    batch = TokenBatch(ids=[[2, 5, 7, 3]], prompt_lengths=[0])
    copies: list[weakref.ref[torch.nn.Parameter]] = []
    copied = copy.deepcopy

    def deepcopy(value: Any, memo: dict[int, Any] | None = None) -> Any:
        made = copied(value, memo)
        if isinstance(value, SentenceTransformer):
            assert made.tokenizer is value.tokenizer
            copies.append(weakref.ref(next(made.parameters())))
        return made

    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(backend.run_fp32, [batch] * 8))
    assert len(copies) == 1
    assert all((result.dense == results[0].dense).all() for result in results)
    backend.run(batch)
    assert copies[0]() is not None
    monkeypatch.setattr(backend_module, "_FP32_COPY_S", -1.0)
    backend.run(batch)
    assert copies[0]() is None
    backend.run_fp32(batch)
    assert len(copies) == 2


def test_closing_frees_the_weights_at_once(family_directory: Callable[[str], Path]) -> None:
    """Not when the collector next runs, although the modules refer to each other, and are excluded from collection."""
    backend = load_torch(family_directory("bert-mean-normalize"))
    assert backend._pipeline is not None
    parameter = weakref.ref(next(backend._pipeline.parameters()))
    gc.freeze()
    gc.disable()
    try:
        backend.close()
        assert parameter() is None
    finally:
        gc.enable()


def test_batches_of_two_threads_are_independent(family_directory: Callable[[str], Path]) -> None:
    """As those of two streams of a GPU, packed and padded."""
    for packed in (False, True):
        backend = load_torch(family_directory("bert-prompts-excluded"))
        if packed:
            backend.pack(reference_kernel)
        batches = [
            TokenBatch(ids=[[2, *range(5, 5 + size), 3]] * 3, prompt_lengths=[0, size % 3, 1]) for size in range(1, 20)
        ]
        expected = [backend.run(batch).dense for batch in batches]
        with ThreadPoolExecutor(2) as pool:
            for vectors, outputs in zip(expected, pool.map(backend.run, batches), strict=True):
                np.testing.assert_array_equal(outputs.dense, vectors)


def _named(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def test_auto_is_fp32_for_a_repository_in_fp16(tmp_path: Path) -> None:
    """On a CPU the dtype of the files does not matter."""
    directory = save_bare(tmp_path / "half", bert, wordpiece())
    weights = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    edit_json(directory / "config.json", dtype="float16")
    backend = load_torch(directory)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    assert backend.description.precision == "fp32"
    assert cosines(embed_texts(backend, TEXTS), expected).min() > 1 - 1e-6


def test_models_loaded_at_the_same_time_keep_their_precision(family_directory: Callable[[str], Path]) -> None:
    """transformers changes the default dtype of the process while it loads a model; it must be restored."""
    directory = family_directory("bert-mean-normalize")
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load_torch, directory, precision=p) for p in ("bf16", "fp32", "fp16", "fp32") * 2]
        precisions = [future.result().description.precision for future in loads]
    assert precisions == ["bf16", "fp32", "fp16", "fp32"] * 2
    assert torch.get_default_dtype() == torch.float32


# --- invalid inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[[5, 100_000]], [[-1, 5]], [[5] * 49]])
def test_invalid_tokens_are_an_error(ids: list[list[int]], family_directory: Callable[[str], Path]) -> None:
    """Ids or lengths that the model does not support; the next batch is answered."""
    backend = load_torch(family_directory("bert-mean-normalize"))
    with pytest.raises(InferenceError):
        backend.run(TokenBatch(ids=ids, prompt_lengths=[0]))
    assert backend.run(TokenBatch(ids=[[5]], prompt_lengths=[0])).dense.shape == (1, 48)


def test_a_closed_backend_raises(family_directory: Callable[[str], Path]) -> None:
    backend = load_torch(family_directory("bert-mean-normalize"))
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.run(TokenBatch(ids=[[5]], prompt_lengths=[0]))
