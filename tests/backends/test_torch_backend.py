"""Which backend, device and precision serve, how precisely, and which tokens are refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.pytorch.backend import TorchBackend, load_backend
from emb_model_provider.errors import (
    DeviceUnavailableError,
    InferenceError,
    LoadError,
)
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
from tests.backends.small_tokenizers import wordpiece
from tests.models import (
    bert,
    bundled_directory,
    save_bare,
    snapshot_of,
    spec_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def load(directory: Path, *, trust: bool = False, **spec: Any) -> TorchBackend:
    return TorchBackend(spec_of(**spec), snapshot_of(directory), trust_remote_code=trust)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- choosing -------------------------------------------------------------------------------------------


def test_auto_backend_is_torch(family_directory: Callable[[str], Path]) -> None:
    """Until there is a compiled backend, auto means torch."""
    backend = load_backend(spec_of(), snapshot_of(family_directory("bert-cls")), trust_remote_code=False)
    assert backend.description.backend == "torch"


def test_the_openvino_backend_is_not_there_yet(family_directory: Callable[[str], Path]) -> None:
    """The message names the setting and what can be set."""
    spec = spec_of(backend="openvino")
    with pytest.raises(LoadError, match=r"EMB_PROVIDER_BACKEND=openvino is not there yet.*torch"):
        load_backend(spec, snapshot_of(family_directory("bert-cls")), trust_remote_code=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_on_a_machine_without_it_is_refused(tmp_path: Path) -> None:
    """The message names EMB_PROVIDER_DEVICE."""
    with pytest.raises(DeviceUnavailableError, match="EMB_PROVIDER_DEVICE=cuda"):
        load(tmp_path, device="cuda")


# --- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.99), ("fp16", 0.9999)])
def test_half_precisions_on_a_cpu_stay_near_fp32(precision: str, bound: float) -> None:
    """The bundled model in bf16 and fp16 stays within a stated cosine of fp32; results are float32."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    backend = load(bundled_directory(), precision=precision)
    vectors = embed_texts(backend, texts)
    assert vectors.dtype == np.float32
    assert backend.description.precision == precision
    assert bound <= cosines(vectors, expected).min() < 1 - 1e-9


# The small models' wide random weights magnify rounding beyond what a trained model shows.
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.98), ("fp16", 0.999)])
@pytest.mark.parametrize("family", ["bert-dense", "xlm-roberta", "mpnet", "modernbert", "qwen3-left"])
def test_families_in_half_precision_on_a_cpu(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    """Every architecture runs in bf16 and fp16 on a CPU, within a stated cosine of fp32."""
    expected = embed_texts(load(family_directory(family)), TEXTS)
    vectors = embed_texts(load(family_directory(family), precision=precision), TEXTS)
    assert bound <= cosines(vectors, expected).min() < 1 - 1e-9


def test_what_overflows_in_fp16_is_computed_again_at_fp32(
    family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two rows of the embeddings add up to more than fp16 holds; at fp32 the vector is right, and `embed` is as before."""
    directory = tmp_path / "large"
    shutil.copytree(family_directory("bert-mean-normalize"), directory)
    (weights,) = directory.rglob("*.safetensors")
    tensors = load_file(weights)
    tensors[_named(tensors, "word_embeddings.weight")][7] = 60_000
    tensors[_named(tensors, "position_embeddings.weight")][2] = 60_000
    save_file(tensors, weights, metadata={"format": "pt"})
    batch = TokenBatch(ids=[[2, 5, 7, 3], [2, 7, 5, 3]], prompt_lengths=[0, 0])
    expected = load(directory).embed(batch)
    backend = load(directory, precision="fp16")
    finite = np.isfinite(backend.embed(batch)).all(axis=1)
    assert finite.tolist() == [False, True]
    assert cosines(backend.embed_fp32(batch), expected).min() > 0.999
    assert np.isfinite(backend.embed(batch)).all(axis=1).tolist() == finite.tolist()


def _named(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


def test_a_repository_in_fp16_is_computed_in_fp32_on_a_cpu(tmp_path: Path) -> None:
    """auto on a CPU is fp32 whatever dtype the repository was saved in."""
    directory = save_bare(tmp_path / "half", bert, wordpiece())
    weights = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    edit_json(directory / "config.json", dtype="float16")
    backend = load(directory)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    assert backend.description.precision == "fp32"
    assert cosines(embed_texts(backend, TEXTS), expected).min() > 1 - 1e-6


def test_models_loaded_at_the_same_time_keep_their_precision(family_directory: Callable[[str], Path]) -> None:
    """transformers changes the process's default dtype while it loads; loads do not leave it changed."""
    directory = family_directory("bert-mean-normalize")
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, directory, precision=p) for p in ("bf16", "fp32", "fp16", "fp32") * 2]
        found = [future.result().description.precision for future in loads]
    assert found == ["bf16", "fp32", "fp16", "fp32"] * 2
    assert torch.get_default_dtype() == torch.float32


# --- inputs that cannot be looked up --------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[[5, 100_000]], [[-1, 5]], [[5] * 49]])
def test_tokens_the_model_cannot_look_up_are_refused(
    ids: list[list[int]], family_directory: Callable[[str], Path]
) -> None:
    """An id or a length outside the model is an error, and the backend answers the next batch."""
    backend = load(family_directory("bert-mean-normalize"))
    with pytest.raises(InferenceError):
        backend.embed(TokenBatch(ids=ids, prompt_lengths=[0]))
    assert backend.embed(TokenBatch(ids=[[5]], prompt_lengths=[0])).shape == (1, 48)


def test_a_closed_backend_does_not_answer(family_directory: Callable[[str], Path]) -> None:
    """close() lets go of the model."""
    backend = load(family_directory("bert-mean-normalize"))
    backend.close()
    with pytest.raises(RuntimeError, match="closed"):
        backend.embed(TokenBatch(ids=[[5]], prompt_lengths=[0]))
