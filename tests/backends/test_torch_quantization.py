"""int8 and int4 in the torch backend: how near they stay to fp32, what they save, and what is refused."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.backends.pytorch.quantization import Int8Embedding
from emb_model_provider.errors import UnsupportedModelError, UnsupportedPrecisionError
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
from tests.backends.small_tokenizers import wordpiece
from tests.models import bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def load(directory: Path, **spec: Any) -> TorchBackend:
    return TorchBackend(spec_of(**spec), snapshot_of(directory), trust_remote_code=False)


def weights_of(backend: TorchBackend) -> list[torch.nn.Module]:
    pipeline = backend._pipeline
    assert pipeline is not None
    return list(pipeline.modules())


# Floors on random weights, drawn wide: rounding shows there far more than in a trained model. Their layers are not
# whole blocks, so this is also the way that ill-fitting layers are computed.
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.94), ("int4", 0.5)])
@pytest.mark.parametrize("family", ["bert-dense", "xlm-roberta", "mpnet", "modernbert", "qwen3-left"])
def test_families_in_integers_on_a_cpu(
    family: str, precision: str, bound: float, family_directory: Callable[[str], Path]
) -> None:
    """Every architecture runs in int8 and int4, above a stated cosine to sentence-transformers in fp32."""
    expected = reference(family_directory(family)).encode(TEXTS, show_progress_bar=False)
    backend = load(family_directory(family), precision=precision)
    vectors = embed_texts(backend, TEXTS)
    assert vectors.dtype == np.float32
    assert (backend.description.precision, backend.description.device) == (precision, "cpu")
    assert bound <= cosines(vectors, expected).min() < 1 - 1e-9


@pytest.mark.parametrize(("precision", "lowest", "mean"), [("int8", 0.998, 0.999), ("int4", 0.92, 0.965)])
def test_the_bundled_model_in_integers(precision: str, lowest: float, mean: float) -> None:
    """A trained model stays above stated cosines to fp32."""
    texts = [text for text in TEXTS if text.strip()]
    expected = reference(bundled_directory()).encode(texts, show_progress_bar=False)
    found = cosines(embed_texts(load(bundled_directory(), precision=precision), texts), expected)
    assert lowest <= found.min() < 1 - 1e-9
    assert mean <= found.mean()


def test_what_each_precision_holds() -> None:
    """int8 leaves no floating linear layer; int4 has nf4 in the feed-forward layers; words are int8 in both."""
    from bitsandbytes.nn import Linear4bit
    from torchao.quantization import Int8Tensor

    eight, four = (load(bundled_directory(), precision=precision) for precision in ("int8", "int4"))
    for backend, quarters in (
        (eight, 0),
        (four, 12 + 1),
    ):  # two layers in each of six blocks, and BERT's pooler
        modules = weights_of(backend)
        assert sum(isinstance(module, Linear4bit) for module in modules) == quarters
        plain = [module for module in modules if type(module) is torch.nn.Linear]
        assert len(plain) == 6 * 6 + 1 - quarters
        assert all(isinstance(module.weight, Int8Tensor) for module in plain)
        assert sum(isinstance(module, Int8Embedding) for module in modules) == 1
    assert any("feed-forward" in note for note in four.description.notes)


@pytest.mark.parametrize(
    ("precision", "package"), [("int8", "torchao"), ("int4", "bitsandbytes"), ("int4", "torchao")]
)
def test_a_missing_extra_is_named(
    precision: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package the error gives both commands that bring it, and no file is read."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedPrecisionError) as caught:
        load(tmp_path, precision=precision)
    assert f"needs {package}, which is not installed" in caught.value.message
    assert "uv sync --extra quantization" in caught.value.message
    assert 'pip install "emb-model-provider[quantization]"' in caught.value.message
    assert "EMB_PROVIDER_BACKEND=auto" in caught.value.message


def test_a_model_without_layers_to_quantize_is_refused(tmp_path: Path) -> None:
    """A table of static word vectors has no linear layers: the message says what to use."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=24)
    model = SentenceTransformer(modules=[static], device="cpu", local_files_only=True)
    model.save(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(UnsupportedModelError, match=r"int8.*no linear layers.*fp32"):
        load(tmp_path / "static", precision="int8")


def test_other_precisions_do_not_import_the_extra() -> None:
    """bitsandbytes is imported for int4 alone, and nothing of its import reaches the log."""
    program = (
        "import sys; from tests.models import *; from emb_model_provider.backends.pytorch.backend import load_backend\n"
        "def load(p): return load_backend(spec_of(precision=p), snapshot_of(bundled_directory()), "
        "trust_remote_code=False)\n"
        "load('fp32'); assert 'bitsandbytes' not in sys.modules\n"
        "load('int4'); assert 'bitsandbytes' in sys.modules; assert 'kernels' not in sys.modules\n"
    )
    # The models of the tests import transformers themselves, and with it torchao.
    program = (
        "from emb_model_provider.backends.pytorch.import_guards import quiet_imports\nwith quiet_imports(): import transformers.modeling_utils\n"
        + program
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr
    assert "KernelPreference" not in done.stderr


def test_a_failed_import_leaves_the_loggers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quiet during an import speaks again after it."""
    from emb_model_provider.backends.pytorch.import_guards import quiet_imports

    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    with pytest.raises(ModuleNotFoundError), quiet_imports():
        importlib.import_module("no_such_package_anywhere")
    assert logger.level == level
    assert sys.modules.get("kernels", "absent") == "absent"


def test_an_int8_table_gives_its_rows() -> None:
    """Rows come back within half a step of their own scale, zeros as zeros, and in the table's dtype."""
    torch.manual_seed(5)
    table = torch.nn.Embedding(10, 16, padding_idx=3, dtype=torch.bfloat16)
    with torch.inference_mode():
        table.weight[7] *= 100
        ids = torch.tensor([[0, 7, 3], [9, 9, 1]])
        expected, found = table(ids), Int8Embedding(table)(ids)
        steps = table.weight.abs().amax(dim=1).float() / 127
    assert found.dtype == torch.bfloat16
    assert found.shape == (2, 3, 16)
    # Half a step, and bf16's own rounding of the largest value in a row.
    assert ((found - expected).float().abs() <= steps[ids].unsqueeze(-1) * 1.1).all()
    assert (found[0, 2] == 0).all()
