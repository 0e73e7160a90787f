"""int8 and int4 in the torch backend: accuracy, quantized modules, and errors."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from emb_model_provider.backends.pytorch import quiet_imports
from emb_model_provider.backends.pytorch.quantization import Int8Embedding, quantize_pipeline
from emb_model_provider.errors import UnsupportedModelError, UnsupportedPrecisionError
from tests.backends.helpers import TEXTS, cosines, embed_texts, load_torch, load_torch_pipeline, reference
from tests.backends.small_tokenizers import wordpiece
from tests.models import bundled_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.backends.base import ComputePrecision


# Rounding has more effect on the wide random weights of the small models than on trained weights. Their layers are not
# whole blocks, so this also tests layers without the fast layout.
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.94), ("int4", 0.5)])
@pytest.mark.parametrize("family", ["bert-dense", "xlm-roberta", "mpnet", "modernbert", "qwen3-left"])
def test_families_with_integer_weights(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    expected = reference(family_directory(family)).encode(TEXTS, show_progress_bar=False)
    backend = load_torch(family_directory(family), precision=precision)
    vectors = embed_texts(backend, TEXTS)
    assert vectors.dtype == np.float32
    assert (backend.description.precision, backend.description.device) == (precision, "cpu")
    assert bound <= cosines(vectors, expected).min() < 1 - 1e-9


@pytest.mark.parametrize(("precision", "lowest", "mean"), [("int8", 0.998, 0.999), ("int4", 0.92, 0.965)])
def test_the_bundled_model_with_integer_weights(precision: str, lowest: float, mean: float) -> None:
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    similar = cosines(embed_texts(load_torch(bundled_directory(), precision=precision), texts), expected)
    assert lowest <= similar.min() < 1 - 1e-9
    assert mean <= similar.mean()


# BERT's pooler and the two feed-forward layers of each of the six blocks.
@pytest.mark.parametrize(("precision", "nf4_layers"), [("int8", 0), ("int4", 12 + 1)])
def test_quantized_modules(precision: ComputePrecision, nf4_layers: int) -> None:
    """No linear layer is floating point, only feed-forward layers are nf4, and the word table is int8."""
    from bitsandbytes.nn import Linear4bit
    from torchao.quantization import Int8Tensor

    pipeline = load_torch_pipeline(bundled_directory())
    notes = quantize_pipeline(pipeline, precision=precision, device="cpu")
    modules = list(pipeline.modules())
    assert sum(isinstance(module, Linear4bit) for module in modules) == nf4_layers
    linear = [module for module in modules if type(module) is torch.nn.Linear]
    assert len(linear) == 6 * 6 + 1 - nf4_layers
    assert all(isinstance(module.weight, Int8Tensor) for module in linear)
    assert sum(isinstance(module, Int8Embedding) for module in modules) == 1
    assert any("feed-forward" in note for note in notes) == (precision == "int4")


@pytest.mark.parametrize(("precision", "package"), [("int8", "torchao"), ("int4", "bitsandbytes"), ("int4", "torchao")])
def test_a_missing_package_is_an_error(
    precision: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message contains both commands that install it, and no file is read."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedPrecisionError) as caught:
        load_torch(tmp_path, precision=precision)
    assert f"needs {package}, which is not installed" in caught.value.message
    assert "uv sync --extra quantization" in caught.value.message
    assert 'pip install "emb-model-provider[quantization]"' in caught.value.message
    assert "EMB_PROVIDER_BACKEND=auto" in caught.value.message


def test_a_model_without_linear_layers_is_an_error(tmp_path: Path) -> None:
    """The message names precisions that can be used."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=24)
    model = SentenceTransformer(modules=[static], device="cpu", local_files_only=True)
    model.save(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(UnsupportedModelError, match=r"int8.*no linear layers.*fp32"):
        load_torch(tmp_path / "static", precision="int8")


@pytest.mark.slow
def test_bitsandbytes_is_imported_for_int4_only() -> None:
    """The imports of the backend and of bitsandbytes write nothing to the log."""
    program = (
        "import sys; from emb_model_provider.backends.pytorch.backend import TorchBackend; from tests.models import *\n"
        "def load(p): return TorchBackend(spec_of(precision=p), snapshot_of(bundled_directory()), "
        "trust_remote_code=False)\n"
        "load('fp32'); assert 'bitsandbytes' not in sys.modules\n"
        "load('int4'); assert 'bitsandbytes' in sys.modules; assert 'kernels' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr
    assert "KernelPreference" not in done.stderr


def test_a_failed_import_restores_the_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    with pytest.raises(ModuleNotFoundError), quiet_imports():
        importlib.import_module("no_such_package_anywhere")
    assert logger.level == level
    assert sys.modules.get("kernels", "absent") == "absent"


def test_an_int8_table_returns_its_rows() -> None:
    """Within half a step of the scale of the row, zeros as zeros, and in the dtype of the table."""
    torch.manual_seed(5)
    table = torch.nn.Embedding(10, 16, padding_idx=3, dtype=torch.bfloat16)
    with torch.inference_mode():
        table.weight[7] *= 100
        ids = torch.tensor([[0, 7, 3], [9, 9, 1]])
        expected, rows = table(ids), Int8Embedding(table)(ids)
        steps = table.weight.abs().amax(dim=1).float() / 127
    assert rows.dtype == torch.bfloat16
    assert rows.shape == (2, 3, 16)
    # Half a step, and the rounding of the largest value of a row by bf16.
    assert ((rows - expected).float().abs() <= steps[ids].unsqueeze(-1) * 1.1).all()
    assert (rows[0, 2] == 0).all()
