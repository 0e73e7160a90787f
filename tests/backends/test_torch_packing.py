"""Batches without padding give the padded batches' vectors: on a CPU, with attention input by input."""

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
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.backends.pytorch.packing import FAMILIES, disagreement, varlen_available
from emb_model_provider.backends.tokenization import Tokenization
from tests.backends.comparison import TEXTS, cosines, embed_texts, spread
from tests.backends.small_tokenizers import wordpiece
from tests.models import save_st, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    *,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Attention as the packing kernel defines it, one input after the other: slow, exact, on any device."""
    assert starts.dtype == torch.int32
    rows = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - start <= longest
        cache_locations = torch.arange(end - start)
        back = cache_locations[:, None] - cache_locations[None, :]
        left, right = (float("inf") if side < 0 else side for side in window)
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=(back <= left) & (-back <= right), scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        rows.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(rows)


def blind_to_starts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **_: Any) -> Any:
    """A wrong kernel: every token sees every input."""
    starts = torch.tensor([0, len(query)], dtype=torch.int32)
    return one_by_one(query, key, value, starts, len(query), scale=0.3, window=(-1, -1))


def failing(*args: Any, **_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel for this device")


def load(directory: Path, **spec: object) -> TorchBackend:
    return TorchBackend(spec_of(**spec), snapshot_of(directory), trust_remote_code=False)


@pytest.mark.parametrize(
    "family",
    ["bert-dense", "bert-prompts-excluded", "xlm-roberta", "modernbert", "qwen3-left"],
)
def test_packed_equals_padded(family: str, family_directory: Callable[[str], Path]) -> None:
    """Mixed texts, each prompt, and a single text get the same vectors with and without padding."""
    backend = load(family_directory(family))
    prompts = ["", *backend.description.prompts.values()]
    padded = [embed_texts(backend, TEXTS, prompt=prompt) for prompt in prompts]
    assert not backend.packs
    backend.pack(one_by_one)
    assert backend.packs
    assert backend.description.notes == ()
    for prompt, expected in zip(prompts, padded, strict=True):
        assert cosines(embed_texts(backend, TEXTS, prompt=prompt), expected).min() >= 0.999999
    alone = np.concatenate([embed_texts(backend, [text], prompt="") for text in TEXTS])
    assert cosines(alone, padded[0]).min() >= 0.999999
    assert spread(padded[0][:6]) < 0.999


def small(config: type, model: type, **values: Any) -> Callable[[PreTrainedTokenizerFast], PreTrainedModel]:
    def build(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        shape = {
            "vocab_size": len(tokenizer), "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 96, "max_position_embeddings": 80, "initializer_range": 0.5,
            "pad_token_id": tokenizer.pad_token_id, **values,
        }  # fmt: skip
        made: PreTrainedModel = model(config(**shape))
        return made

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
def test_every_family_on_the_table_packs(family: str, tmp_path: Path) -> None:
    """What the table names gives the padded vectors, sliding windows and shared heads included."""
    backend = load(save_st(tmp_path / family, OTHERS[family], wordpiece()))
    padded = embed_texts(backend, TEXTS)
    backend.pack(one_by_one)
    assert backend.packs, backend.description.notes
    assert cosines(embed_texts(backend, TEXTS), padded).min() >= 0.999999


def test_no_family_is_on_the_table_untested() -> None:
    """The table is what the two tests above cover."""
    assert {*OTHERS, "bert", "xlm-roberta", "modernbert", "qwen3"} == FAMILIES


@pytest.mark.parametrize("family", ["mpnet"])
def test_other_families_stay_padded(family: str, family_directory: Callable[[str], Path]) -> None:
    """A family with a bias by relative position is served padded, without a word."""
    backend = load(family_directory(family))
    backend.pack(one_by_one)
    assert not backend.packs
    assert backend.description.notes == ()


@pytest.mark.parametrize(
    ("kernel", "says"), [(blind_to_starts, "cosine"), (failing, "no kernel for this device")]
)
def test_a_model_that_does_not_agree_stays_padded(
    kernel: Any, says: str, family_directory: Callable[[str], Path]
) -> None:
    """A kernel that gives other vectors, or none, is not used: a note says so, and the vectors are the padded ones."""
    backend = load(family_directory("bert-mean-normalize"))
    expected = embed_texts(backend, TEXTS)
    backend.pack(kernel)
    assert not backend.packs
    assert any("inputs are padded" in note and says in note for note in backend.description.notes)
    np.testing.assert_array_equal(embed_texts(backend, TEXTS), expected)


def test_a_packed_row_is_as_long_as_its_inputs(family_directory: Callable[[str], Path]) -> None:
    """No token is computed that was not asked for; positions start anew with each input."""
    backend = load(family_directory("bert-mean-normalize"))
    backend.pack(one_by_one)
    assert backend._packing is not None
    features = backend._packing.features([[5, 6, 7], [8], [9, 10]], torch.tensor([5, 6, 7, 8, 9, 10]))
    assert features["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert features["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert features["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert features["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert features["max_length_q"] == 3
    assert "attention_mask" not in features


def test_a_padding_token_within_an_input_keeps_its_position(family_directory: Callable[[str], Path]) -> None:
    """The RoBERTa family does not count it; packed rows do the same."""
    backend = load(family_directory("xlm-roberta"))
    pad = backend.description.pad_token_id
    batch = TokenBatch(ids=[[0, 9, pad, 12, 2], [0, 14, 2]], prompt_lengths=[0, 0])
    padded = backend.embed(batch)
    backend.pack(one_by_one)
    assert cosines(backend.embed(batch), padded).min() >= 0.999999


def test_two_models_pack_beside_a_padded_one(family_directory: Callable[[str], Path]) -> None:
    """A model's attention is its own: packing one changes no other."""
    directory = family_directory("bert-mean-normalize")
    first, second, third = load(directory), load(directory), load(directory)
    expected = embed_texts(third, TEXTS)
    first.pack(one_by_one)
    second.pack(one_by_one)
    for backend in (first, second, third):
        assert cosines(embed_texts(backend, TEXTS), expected).min() >= 0.999999
    assert (first.packs, second.packs, third.packs) == (True, True, False)


def test_fp32_is_had_from_a_model_that_packs(family_directory: Callable[[str], Path]) -> None:
    """What is computed again at fp32 is padded; the model itself goes on without padding."""
    directory = family_directory("bert-mean-normalize")
    backend = load(directory, precision="fp16")
    backend.pack(one_by_one)
    ids = Tokenization(backend.description).encode(TEXTS, truncate="END").ids
    batch = TokenBatch(ids=ids, prompt_lengths=[0] * len(ids))
    half, expected = backend.embed(batch), embed_texts(load(directory), TEXTS)
    assert cosines(backend.embed_fp32(batch), expected).min() >= 0.99999
    assert backend.packs
    np.testing.assert_array_equal(backend.embed(batch), half)


def test_how_far_packing_may_be_off() -> None:
    """As far as padding itself moves vectors, times three; never more than one part in a hundred; never NaN."""
    rows = np.eye(3, 8, dtype=np.float32)

    def off(angle: float) -> np.ndarray[Any, np.dtype[np.float32]]:
        moved = rows * np.float32(np.cos(angle))
        moved[:, 7] = np.sin(angle)
        return moved

    assert disagreement(rows, rows, rows) is None
    assert disagreement(off(0.013), rows, rows) is None  # 1 - cos is 0.00008
    assert disagreement(off(0.05), rows, rows) is not None
    assert disagreement(off(0.05), rows, off(0.04)) is None  # padding alone moves as far
    assert disagreement(off(0.3), rows, off(0.3)) is not None
    assert disagreement(rows * np.nan, rows, rows) is not None


def test_a_cpu_has_no_kernel_for_packed_rows() -> None:
    """A CPU pads."""
    assert not varlen_available(torch.device("cpu"))
