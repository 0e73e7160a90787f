"""Packed batches have the vectors of padded ones. On a CPU, with a reference kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import (
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.pytorch.packing import (
    FAMILIES,
    Packing,
    disagreement,
    flash_operator_fits,
    varlen_available,
    varlen_kernel,
)
from emb_model_provider.backends.tokenization import Tokenization
from tests.backends.helpers import (
    TEXTS,
    cosines,
    embed_texts,
    highest_similarity,
    load_torch,
    load_torch_pipeline,
    reference_kernel,
)
from tests.backends.small_tokenizers import wordpiece
from tests.models import save_st

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def kernel_without_starts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **_: Any) -> Any:
    """Compute attention over all inputs together, which is wrong."""
    starts = torch.tensor([0, len(query)], dtype=torch.int32)
    return reference_kernel(query, key, value, starts, len(query), scale=0.3, window=(-1, -1))


def failing_kernel(*args: Any, **_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel for this device")


@pytest.mark.parametrize("family", ["bert-dense", "bert-prompts-excluded", "xlm-roberta", "modernbert", "qwen3-left"])
def test_packed_equals_padded(family: str, family_directory: Callable[[str], Path]) -> None:
    """For mixed texts, each prompt, and single texts."""
    backend = load_torch(family_directory(family))
    prompts = ["", *backend.description.prompts.values()]
    padded = [embed_texts(backend, TEXTS, prompt=prompt) for prompt in prompts]
    assert not backend.packs
    backend.pack(reference_kernel)
    assert backend.packs
    assert backend.description.notes == ()
    for prompt, expected in zip(prompts, padded, strict=True):
        assert cosines(embed_texts(backend, TEXTS, prompt=prompt), expected).min() >= 0.999999
    alone = np.concatenate([embed_texts(backend, [text], prompt="") for text in TEXTS])
    assert cosines(alone, padded[0]).min() >= 0.999999
    assert highest_similarity(padded[0][:6]) < 0.999


def small(config: type, model: type, **values: Any) -> Callable[[PreTrainedTokenizerFast], PreTrainedModel]:
    def build(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        shape = {
            "vocab_size": len(tokenizer), "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96, "max_position_embeddings": 80, "initializer_range": 0.5,
            "pad_token_id": tokenizer.pad_token_id, **values,
        }  # fmt: skip
        result: PreTrainedModel = model(config(**shape))
        return result

    return build


GROUPED = {"num_key_value_heads": 2, "head_dim": 12, "bos_token_id": None, "eos_token_id": None}
OTHERS = {
    "roberta": small(RobertaConfig, RobertaModel, type_vocab_size=1),
    "camembert": small(CamembertConfig, CamembertModel, type_vocab_size=1),
    "distilbert": small(DistilBertConfig, DistilBertModel, dim=48, n_layers=2, n_heads=4, hidden_dim=96),
    "llama": small(LlamaConfig, LlamaModel, **GROUPED),
    "mistral": small(MistralConfig, MistralModel, sliding_window=8, **GROUPED),
    "qwen2": small(Qwen2Config, Qwen2Model, **GROUPED),
    "gemma3_text": small(
        Gemma3TextConfig,
        Gemma3TextModel,
        **GROUPED,
        sliding_window=8,
        use_bidirectional_attention=True,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=12,
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_all_supported_families_are_packed(family: str, tmp_path: Path) -> None:
    """Including those with sliding windows and shared heads."""
    backend = load_torch(save_st(tmp_path / family, OTHERS[family], wordpiece()))
    padded = embed_texts(backend, TEXTS)
    backend.pack(reference_kernel)
    assert backend.packs, backend.description.notes
    assert cosines(embed_texts(backend, TEXTS), padded).min() >= 0.999999


def test_all_supported_families_are_tested() -> None:
    """By the two tests above."""
    assert {*OTHERS, "bert", "xlm-roberta", "modernbert", "qwen3"} == FAMILIES


@pytest.mark.parametrize("family", ["mpnet"])
def test_other_families_are_padded(family: str, family_directory: Callable[[str], Path]) -> None:
    """Those with relative position biases, without a note."""
    backend = load_torch(family_directory(family))
    backend.pack(reference_kernel)
    assert not backend.packs
    assert backend.description.notes == ()


@pytest.mark.parametrize(
    ("kernel", "reason"), [(kernel_without_starts, "cosine"), (failing_kernel, "no kernel for this device")]
)
def test_a_model_is_padded_if_packing_changes_its_vectors(
    kernel: Any, reason: str, family_directory: Callable[[str], Path]
) -> None:
    """Or if the kernel fails. A note says why, and the vectors are those of padded batches."""
    backend = load_torch(family_directory("bert-mean-normalize"))
    expected = embed_texts(backend, TEXTS)
    backend.pack(kernel)
    assert not backend.packs
    assert any("inputs are padded" in note and reason in note for note in backend.description.notes)
    np.testing.assert_array_equal(embed_texts(backend, TEXTS), expected)


def test_a_packed_row_is_as_long_as_its_inputs(family_directory: Callable[[str], Path]) -> None:
    """There is no padding, and the positions of each input start at 0."""
    pipeline = load_torch_pipeline(family_directory("bert-mean-normalize"))
    packing = Packing(pipeline, reference_kernel)
    features = packing.features(np.array([5, 6, 7, 8, 9, 10]), [3, 1, 2], torch.device("cpu"))
    assert features["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert features["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert features["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert features["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert features["cu_seq_lens_q"].dtype == torch.int32
    assert features["max_length_q"] == 3
    assert "attention_mask" not in features


def test_a_padding_token_within_an_input_has_no_position(family_directory: Callable[[str], Path]) -> None:
    """The RoBERTa family does not count it, and neither does packing."""
    backend = load_torch(family_directory("xlm-roberta"))
    pad = backend.description.pad_token_id
    batch = TokenBatch(ids=[[0, 9, pad, 12, 2], [0, 14, 2]], prompt_lengths=[0, 0])
    padded = backend.run(batch).dense
    backend.pack(reference_kernel)
    assert cosines(backend.run(batch).dense, padded).min() >= 0.999999


def test_packing_changes_only_one_model(family_directory: Callable[[str], Path]) -> None:
    """Two packed models and a padded one have the same vectors."""
    directory = family_directory("bert-mean-normalize")
    first, second, third = load_torch(directory), load_torch(directory), load_torch(directory)
    expected = embed_texts(third, TEXTS)
    first.pack(reference_kernel)
    second.pack(reference_kernel)
    for backend in (first, second, third):
        assert cosines(embed_texts(backend, TEXTS), expected).min() >= 0.999999
    assert (first.packs, second.packs, third.packs) == (True, True, False)


def test_embed_fp32_of_a_packed_model(family_directory: Callable[[str], Path]) -> None:
    """The copy at fp32 is padded; the model itself is still packed afterwards."""
    directory = family_directory("bert-mean-normalize")
    backend = load_torch(directory, precision="fp16")
    backend.pack(reference_kernel)
    ids = Tokenization(backend.description).encode(TEXTS, truncate="END").ids
    batch = TokenBatch(ids=ids, prompt_lengths=[0] * len(ids))
    half, expected = backend.run(batch).dense, embed_texts(load_torch(directory), TEXTS)
    assert cosines(backend.run_fp32(batch).dense, expected).min() >= 0.99999
    assert backend.packs
    assert backend.description.packs
    np.testing.assert_array_equal(backend.run(batch).dense, half)


def test_the_tolerance_depends_on_the_effect_of_padding() -> None:
    """It is three times the difference that padding makes, at most 0.01. NaN is never accepted."""
    rows = np.eye(3, 8, dtype=np.float32)

    def rotated(angle: float) -> np.ndarray[Any, np.dtype[np.float32]]:
        result = rows * np.float32(np.cos(angle))
        result[:, 7] = np.sin(angle)
        return result

    assert disagreement(rows, rows, rows) is None
    assert disagreement(rotated(0.013), rows, rows) is None  # 1 - cos is 0.00008
    assert disagreement(rotated(0.05), rows, rows) is not None
    assert disagreement(rotated(0.05), rows, rotated(0.04)) is None  # padding alone makes such a difference
    assert disagreement(rotated(0.3), rows, rotated(0.3)) is not None
    assert disagreement(rows * np.nan, rows, rows) is not None


def test_a_cpu_does_not_support_packing() -> None:
    assert not varlen_available(torch.device("cpu"))


def test_the_installed_pytorch_has_the_operator_of_the_kernel() -> None:
    """Otherwise all models would be padded on a GPU, and no test without a GPU would show it."""
    assert flash_operator_fits(torch.ops.aten._flash_attention_forward.default._schema)


@pytest.mark.parametrize("missing", ["Tensor? cum_seq_k, ", ", SymInt? window_size_left=None", "float? scale=None, "])
def test_an_operator_with_other_parameters_is_not_used(missing: str) -> None:
    """A name that is missing, or another order."""
    schema = (
        "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
        "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
        "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None) -> (Tensor, Tensor)"
    )
    assert missing in schema
    assert flash_operator_fits(torch._C.parse_schema(schema))
    assert not flash_operator_fits(torch._C.parse_schema(schema.replace(missing, "")))


@pytest.mark.parametrize(
    ("heads", "shared", "width", "window"), [(4, 4, 12, (-1, -1)), (4, 2, 64, (-1, 0)), (4, 2, 8, (8, 0))]
)
def test_the_kernel_calls_the_operator_with_valid_arguments(
    heads: int, shared: int, width: int, window: tuple[int, int]
) -> None:
    """On the device `meta`, which checks arguments and shapes, and computes nothing. Rows need not be contiguous."""
    lengths = [3, 5]
    starts = torch.tensor([0, 3, 8], dtype=torch.int32, device="meta")
    query, key, value = (
        torch.empty((count, sum(lengths), width), dtype=torch.float16, device="meta").transpose(0, 1)
        for count in (heads, shared, shared)
    )
    attended = varlen_kernel(query, key, value, starts, 5, scale=0.3, window=window)
    assert attended.shape == (sum(lengths), heads, width)


def test_positions_of_many_inputs(family_directory: Callable[[str], Path]) -> None:
    """Those of the RoBERTa family count from the padding id, without padding tokens."""
    generator = np.random.default_rng(1)
    for family, first in (("bert-cls", 0), ("xlm-roberta", None)):
        backend = load_torch(family_directory(family))
        pad = backend.description.pad_token_id
        rows = [generator.integers(0, 8, size).tolist() for size in (1, 7, 30, 2)]
        if first is None:
            expected = [np.cumsum(np.array(row) != pad) * (np.array(row) != pad) + pad for row in rows]
        else:
            expected = [np.arange(len(row)) for row in rows]
        pipeline = load_torch_pipeline(family_directory(family))
        packing = Packing(pipeline, reference_kernel)
        features = packing.features(np.concatenate(rows), list(map(len, rows)), torch.device("cpu"))
        assert features["position_ids"][0].tolist() == np.concatenate(expected).tolist()
