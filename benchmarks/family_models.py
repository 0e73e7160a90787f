"""Small directories with random weights, one per family, made with the real libraries, configurations and tokenizers.

The weights are wide (`_widen`), so that different texts have clearly different vectors. With the usual 0.02, all texts
would have nearly the same vector, and a comparison could not fail.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import peft
import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    LSTM,
    BoW,
    Dropout,
    LayerNorm,
    Pooling,
    StaticEmbedding,
    WeightedLayerPooling,
    WordEmbeddings,
    WordWeights,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

from benchmarks.family_tokenizers import BERT, LENGTH, known_words, tokenizer
from tests import kind_checks, kind_models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from emb_model_provider.model_spec import Kind

    Expect = Literal["equal", "refused"]
    Reference = Callable[[Path, Sequence[str]], NDArray[np.float32]]
    """Computes the expected vectors of texts, one by one."""

_WIDTH = 48
_PROMPTS = {"query": "query: ", "document": "passage: retrieve "}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table."""

    build: Callable[[Path], object]
    """Writes the directory."""
    expect: Expect = "equal"
    kind: Kind = "dense"
    reference: Reference | None = None
    """None: `encode` of sentence-transformers. For directories that it cannot read, or reads in another way."""
    scores: Callable[[Path, Sequence[tuple[str, str]]], NDArray[np.float32]] | None = None
    """Computes the expected logits of pairs. None: `predict` of sentence-transformers."""
    repository: str = "test/small"
    max_length: int | None = None
    """`max_length` of the model's entry in the mapping."""


# --- transformers -------------------------------------------------------------------------------------


def random_model(
    config: str, tokens: Tokenizer, *, head: str = "AutoModel", std: float = 0.5, **values: Any
) -> PreTrainedModel:
    """Return a small model.

    Args:
        config: Class of its configuration.
        tokens: Its tokenizer.
        head: Class of the model.
        std: Standard deviation of the weights.
        values: Values of the configuration; `-` for those that this class does not have.
    """
    defaults = {
        "vocab_size": len(tokens),
        "hidden_size": _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        **{name: getattr(tokens, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    known = {key: value for key, value in {**defaults, **values}.items() if value != "-"}
    configuration = getattr(transformers, config)(**known)
    torch.manual_seed(7)
    kind = getattr(transformers, head)
    return _widen(kind.from_config(configuration) if head.startswith("Auto") else kind(configuration), std)


def _widen(model: PreTrainedModel, std: float = 0.5) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.1)  # biases, so that a lost one changes the vectors
    return model.eval()


_CAUSAL = {"num_key_value_heads": 2, "max_position_embeddings": 256, "head": "AutoModelForCausalLM"}
_SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "bert", {}),
    "llama": ("LlamaConfig", "llama", _CAUSAL),
    "qwen3": ("Qwen3Config", "qwen", {**_CAUSAL, "head_dim": 12}),
    "xlm-roberta": (
        "XLMRobertaConfig",
        "xlm-roberta",
        # As many rows as the trained vocabulary of `_sentencepiece_only` may need.
        {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "vocab_size": 400},
    ),
}
"""Name to configuration, tokenizer and values, for families that differ in their files and modules only."""


def _small(name: str, tokens: dict[str, Any] | None = None, **values: Any) -> tuple[PreTrainedModel, Tokenizer]:
    """Return a model and its tokenizer; `tokens` are options of the tokenizer."""
    config, kind, defaults = _SMALL[name]
    made = tokenizer(kind, **(tokens or {}))
    return random_model(config, made, **{**defaults, **values}), made


# --- directories --------------------------------------------------------------------------------------


def save_bare(directory: Path, model: PreTrainedModel, tokens: Tokenizer | None) -> Path:
    model.save_pretrained(directory)
    if tokens is not None:
        tokens.save_pretrained(directory)
    return directory


def save_st(
    directory: Path,
    model: PreTrainedModel,
    tokens: Tokenizer,
    *,
    pooling: Any = "mean",
    include_prompt: bool = True,
    normalize: bool = True,
    modules: Callable[[int], Sequence[torch.nn.Module]] | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a directory of sentence-transformers.

    Args:
        directory: The directory.
        model: The transformer.
        tokens: Its tokenizer.
        pooling: The mode or modes of Pooling.
        include_prompt: Whether Pooling includes the tokens of the prompt.
        normalize: Whether Normalize follows Pooling.
        modules: Given the width of the transformer, the modules that replace Pooling and Normalize.
        config: Values of the transformer's configuration.
        options: Values of the constructor of SentenceTransformer.
    """
    first = _transformer(directory, model, tokens, config_kwargs={"local_files_only": True, **(config or {})})
    width = first.get_embedding_dimension()
    torch.manual_seed(11)
    if modules is not None:
        following = list(modules(width))
    else:
        following = [Pooling(width, pooling, include_prompt=include_prompt), *([Normalize()] if normalize else [])]
    return save_modules(directory, [first, *following], **options)


def save_modules(directory: Path, modules: Sequence[torch.nn.Module], **options: Any) -> Path:
    model = SentenceTransformer(modules=list(modules), device="cpu", local_files_only=True, **options)
    model.save(str(directory), create_model_card=False)
    return directory


def _transformer(directory: Path, model: PreTrainedModel, tokens: Tokenizer, **options: Any) -> Transformer:
    """Return the first module of a pipeline, which can only be loaded from a directory."""
    bare = save_bare(directory.with_name(f"{directory.name}-bare"), model, tokens)
    try:
        return Transformer(str(bare), **{"config_kwargs": {"local_files_only": True}, **options})
    finally:
        shutil.rmtree(bare)


def _save(name: str, directory: Path, **options: Any) -> Path:
    return save_st(directory, *_small(name), **options)


def _save_bare(name: str, directory: Path, **values: Any) -> Path:
    return save_bare(directory, *_small(name, **values))


def edit_json(path: Path, remove: Sequence[str] = (), **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {key: value for key, value in values.items() if key not in remove} | changes)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_modules(directory: Path, *kinds: str) -> None:
    """Write the files of modules without weights, as sentence-transformers 2 did; pooling is the mean."""
    modules = []
    for number, kind in enumerate(kinds):
        path = f"{number}_{kind}" if number else ""
        modules.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        (directory / path).mkdir(exist_ok=True)
        if kind == "Pooling":
            modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
            values = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes}
            write_json(directory / path / "config.json", {"word_embedding_dimension": _WIDTH, **values})
    write_json(directory / "modules.json", modules)
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": LENGTH, "do_lower_case": False})


def dense(inputs: int, outputs: int, **options: Any) -> Dense:
    module = Dense(inputs, outputs, **options)
    torch.nn.init.normal_(module.linear.weight, std=0.3)
    return module


def layer_norm(width: int) -> LayerNorm:
    module = LayerNorm(width)
    torch.nn.init.normal_(module.norm.weight, mean=1, std=0.5)
    torch.nn.init.normal_(module.norm.bias, std=0.5)
    return module


_LINEAR = {"activation_function": torch.nn.Identity()}
_TOKENS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}


# --- references ---------------------------------------------------------------------------------------


def by_hand(
    tokens: str, model: str, pool: Callable[[Any], torch.Tensor], *, method: str = "forward", normalize: bool = True
) -> Reference:
    """Return a reference that uses transformers only.

    Args:
        tokens: The tokenizer.
        model: Class of the model.
        pool: Returns the vector of a text, given the output of the model.
        method: Method of the model.
        normalize: Whether vectors have length 1.
    """

    def reference(directory: Path, texts: Sequence[str]) -> NDArray[np.float32]:
        encode = tokenizer(tokens)
        kind = getattr(transformers, model)
        loaded = kind.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
        with torch.inference_mode():
            rows = [
                pool(getattr(loaded, method)(**encode(text, truncation=True, return_tensors="pt"))) for text in texts
            ]
        vectors = torch.stack(rows)
        return (torch.nn.functional.normalize(vectors) if normalize else vectors).numpy()

    return reference


def _first_token(output: Any) -> torch.Tensor:
    return output.last_hidden_state[0, 0]


def _last_token(output: Any) -> torch.Tensor:
    return output.last_hidden_state[0, -1]


def _mean(output: Any) -> torch.Tensor:
    return output.last_hidden_state[0].mean(dim=0)


def _pooled(output: Any) -> torch.Tensor:
    return getattr(output, "pooler_output", output)[0]


# --- families: architectures ----------------------------------------------------------------------------


def _encoder(
    config: str,
    tokens: str,
    *,
    st: dict[str, Any] | None = None,
    expect: Expect = "equal",
    tokens_options: dict[str, Any] | None = None,
    **values: Any,
) -> Family:
    def build(directory: Path) -> Path:
        made = tokenizer(tokens, **(tokens_options or {}))
        return save_st(directory, random_model(config, made, **values), made, **(st or {}))

    return Family(build=build, expect=expect)


def _decoder(config: str, tokens: str = "qwen", **values: Any) -> Family:
    defaults = {"num_key_value_heads": 2, "max_position_embeddings": 256, "head": "AutoModelForCausalLM"}
    return _encoder(config, tokens, st={"pooling": "lasttoken"}, **{**defaults, **values})


# fmt: off
_ROBERTA = {"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_DEBERTA_V2 = {**_DEBERTA, "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
_MOBILEBERT = {"embedding_size": 24, "intra_bottleneck_size": 24, "true_hidden_size": 24, "normalization_type": "layer_norm"}
_FUNNEL = {"d_model": _WIDTH, "block_sizes": [1, 1], "n_head": 4, "d_head": 12, "d_inner": 96, "num_hidden_layers": "-",
           "separate_cls": False, "truncate_seq": False, "head": "FunnelModel"}
_XLNET = {"d_model": _WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 96, "max_position_embeddings": "-"}
_UNSET = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
_T5 = {"d_model": _WIDTH, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
       "std": 0.3, **dict.fromkeys(_UNSET, "-")}
_T5_ENCODER = {**_T5, "head": "T5EncoderModel"}
_GPT2 = {"n_embd": _WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_key_value_heads": "-"}
_GPT_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16,
            **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), "-")}
_MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "std": 0.3}
_FALCON_H1 = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_QWEN3_NEXT = {"head_dim": 12, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 12,
               "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_GEMMA3 = {"num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "num_hidden_layers": 3,
           "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 16,
           "query_pre_attn_scalar": 12}
_EMBEDDING_GEMMA = {
    "modules": lambda n: [Pooling(n), dense(n, 64, **_LINEAR, bias=False), dense(64, n, **_LINEAR, bias=False), Normalize()],
    "prompts": {"query": "task: search query: ", "document": "title: none text: "},
}
_QWEN_PROMPTS = {"query": "Instruct: find it\nQuery:", "document": ""}
# fmt: on

_ENCODERS: dict[str, Family] = {
    "bert": _encoder("BertConfig", "bert"),
    "bert-cased": _encoder("BertConfig", "bert", tokens_options={"do_lower_case": False}),
    "bert-minilm": _encoder("BertConfig", "bert", num_hidden_layers=6, num_attention_heads=12, std=0.3),
    "roberta": _encoder("RobertaConfig", "roberta", **_ROBERTA),
    "roberta-prelayernorm": _encoder("RobertaPreLayerNormConfig", "roberta", **_ROBERTA),
    "camembert": _encoder("CamembertConfig", "camembert", **_ROBERTA),
    "xlm-roberta": _encoder("XLMRobertaConfig", "xlm-roberta", st={"pooling": "cls"}, **_ROBERTA),
    "xlm-roberta-xl": _encoder("XLMRobertaXLConfig", "xlm-roberta", **_ROBERTA),
    "data2vec-text": _encoder("Data2VecTextConfig", "roberta", **_ROBERTA),
    "mpnet": _encoder("MPNetConfig", "mpnet", max_position_embeddings=LENGTH + 2),
    "distilbert": _encoder("DistilBertConfig", "bert", dim=_WIDTH, n_layers=2, n_heads=4, hidden_dim=96),
    "albert": _encoder("AlbertConfig", "albert", embedding_size=16),
    "deberta": _encoder("DebertaConfig", "deberta", **_DEBERTA),
    "deberta-v2": _encoder("DebertaV2Config", "deberta-v2", **_DEBERTA_V2),
    "electra": _encoder("ElectraConfig", "bert", embedding_size=24),
    "ernie": _encoder("ErnieConfig", "bert", use_task_id=True),
    "megatron-bert": _encoder("MegatronBertConfig", "bert"),
    "roformer": _encoder("RoFormerConfig", "bert", st={"pooling": "cls"}),
    "convbert": _encoder("ConvBertConfig", "bert", embedding_size=_WIDTH),
    "mobilebert": _encoder("MobileBertConfig", "mobilebert", st={"pooling": "cls"}, **_MOBILEBERT),
    "squeezebert": _encoder("SqueezeBertConfig", "bert", embedding_size=_WIDTH),
    "nomic-bert": _encoder("NomicBertConfig", "bert"),
    "modernbert": _encoder("ModernBertConfig", "modernbert", num_hidden_layers=3, local_attention=16, cls_token_id=2),
    "eurobert": _encoder("EuroBertConfig", "eurobert", num_key_value_heads=2, mask_token_id=3),
    "ultrabert": _encoder("UltrabertConfig", "eurobert", num_hidden_layers=3, sliding_window=8),
    "gte": _encoder("GteConfig", "xlm-roberta", st={"pooling": "cls"}),
    "jina-embeddings-v3": _encoder("JinaEmbeddingsV3Config", "xlm-roberta"),
    "big-bird": _encoder("BigBirdConfig", "big-bird", attention_type="original_full"),
    "longformer": _encoder("LongformerConfig", "roberta", attention_window=16, max_position_embeddings=66),
    "rembert": _encoder("RemBertConfig", "rembert", input_embedding_size=24, output_embedding_size=24),
    "nystromformer": _encoder("NystromformerConfig", "nystromformer", st={"pooling": "cls"}, num_landmarks=64),
    "funnel": _encoder("FunnelConfig", "funnel", expect="refused", **_FUNNEL),
    "xlnet": _encoder("XLNetConfig", "xlnet", expect="refused", **_XLNET),
    "fnet": _encoder("FNetConfig", "fnet"),
    "t5": _encoder("T5Config", "t5", **_T5_ENCODER),
    "t5-gated": _encoder("T5Config", "t5", feed_forward_proj="gated-gelu", **_T5_ENCODER),
    "t5-with-decoder": _encoder("T5Config", "t5", head="T5ForConditionalGeneration", **_T5),
    "mt5": _encoder("MT5Config", "t5", head="MT5EncoderModel", **_T5),
}

_DECODERS: dict[str, Family] = {
    "qwen2": _decoder("Qwen2Config"),
    "qwen3-left": _decoder("Qwen3Config", head_dim=12),
    "qwen3-right": _decoder("Qwen3Config", tokens_options={"padding_side": "right"}, head_dim=12),
    "qwen3-prompts": Family(build=lambda d: _save("qwen3", d, pooling="lasttoken", prompts=_QWEN_PROMPTS)),
    "llama": _decoder("LlamaConfig", "llama"),
    "llama-mean": _encoder("LlamaConfig", "llama", num_key_value_heads=2),
    "mistral": _decoder("MistralConfig", "llama", sliding_window=16),
    "gemma2": _decoder("Gemma2Config", "gemma", head_dim=12, sliding_window=16, query_pre_attn_scalar=12),
    "gemma3-text": _decoder("Gemma3TextConfig", "gemma", **_GEMMA3),
    "embedding-gemma": _encoder(
        "Gemma3TextConfig", "gemma", st=_EMBEDDING_GEMMA, use_bidirectional_attention=True, **_GEMMA3
    ),
    "embedding-gemma-2": Family(build=lambda d: _embedding_gemma2(d), reference=by_hand("gemma", "AutoModel", _mean)),
    "lfm2": _decoder("Lfm2Config", layer_types=["conv", "full_attention"]),
    "bloom": _decoder("BloomConfig", n_layer=2, n_head=4, num_key_value_heads="-"),
    "gpt2": _decoder("GPT2Config", "gpt2", **_GPT2),
    "opt": _decoder("OPTConfig", "opt", ffn_dim=96, word_embed_proj_dim=_WIDTH, num_key_value_heads="-"),
    "gpt-neo": _decoder("GPTNeoConfig", "gpt2", **_GPT_NEO),
    "gpt-neox": _decoder("GPTNeoXConfig", "gpt-neox", num_key_value_heads="-"),
    "gptj": _decoder("GPTJConfig", "gpt2", rotary_dim=4, **_GPT2),
    "phi": _decoder("PhiConfig", "gpt2"),
    "granite": _decoder("GraniteConfig", "closing token"),
    "olmo2": _decoder("Olmo2Config", "closing token"),
    "smollm3": _decoder("SmolLM3Config", "closing token"),
    "qwen2-moe": _decoder("Qwen2MoeConfig", shared_expert_intermediate_size=48, decoder_sparse_step=1, **_MOE),
    "qwen3-moe": _decoder("Qwen3MoeConfig", head_dim=12, **_MOE),
    "mixtral": _decoder("MixtralConfig", "llama", num_local_experts=4, std=0.3),
    "lfm2-moe": _decoder("Lfm2MoeConfig", layer_types=["conv", "full_attention"], num_dense_layers=1, **_MOE),
    "falcon-h1": _decoder("FalconH1Config", "closing token", std=0.3, **_FALCON_H1),
    "qwen3-next": _decoder("Qwen3NextConfig", shared_expert_intermediate_size=48, **_QWEN3_NEXT, **_MOE),
}


def _embedding_gemma2(directory: Path) -> Path:
    tokens = tokenizer("gemma")
    shared = {key: value for key, value in _GEMMA3.items() if key != "query_pre_attn_scalar"}
    text = {
        **shared,
        "vocab_size": len(tokens),
        "hidden_size": _WIDTH,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "sliding_window": 8,
        "global_head_dim": 24,
        "hidden_size_per_layer_input": 16,
        "embedding_dim": _WIDTH,
    }
    config = transformers.EmbeddingGemma2Config(text_config=text, vision_config=None, audio_config=None)
    torch.manual_seed(7)
    save_bare(directory, _widen(transformers.AutoModel.from_config(config)), tokens)
    write_modules(directory, "Transformer", "Pooling", "Normalize")
    return directory


# --- families: modules ------------------------------------------------------------------------------------


def _bert_with(**options: Any) -> Family:
    return Family(build=lambda directory: _save("bert", directory, **options))


def _modules(modules: Callable[[int], Sequence[torch.nn.Module]], **options: Any) -> Family:
    return _bert_with(modules=modules, **options)


def _static(directory: Path, *following: torch.nn.Module) -> Path:
    torch.manual_seed(3)
    return save_modules(directory, [StaticEmbedding(tokenizer("bert").backend_tokenizer, embedding_dim=24), *following])


def _words(following: Callable[[int], torch.nn.Module] | None = None) -> Family:
    """Return a family of word vectors, with a module between them and Pooling."""

    def build(directory: Path) -> Path:
        words = known_words()
        table = np.random.default_rng(5).normal(size=(len(words), 24)).astype(np.float32)
        first = WordEmbeddings(WhitespaceTokenizer(words, do_lower_case=True), torch.from_numpy(table))
        between = [following(24)] if following is not None else []
        return save_modules(directory, [first, *between, Pooling(24)])

    return Family(build=build, expect="refused")


def _router(directory: Path, *, first: bool) -> Path:
    transformer = _transformer(directory, *_small("bert"))
    torch.manual_seed(11)
    if first:
        routes = {"query": [transformer, Pooling(_WIDTH)], "document": [transformer, Pooling(_WIDTH, "cls")]}
        return save_modules(directory, [Router(routes, default_route="document")])
    routes = {"query": [dense(_WIDTH, 20)], "document": [dense(_WIDTH, 20)]}
    return save_modules(directory, [transformer, Pooling(_WIDTH), Router(routes, default_route="document")])


_POOLINGS = ("cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_EXCLUDED = {"include_prompt": False, "prompts": _PROMPTS, "default_prompt_name": "document"}
_LAYERS = {"config": {"output_hidden_states": True}}

_PIPELINES: dict[str, Family] = {
    **{f"pooling-{mode}": _bert_with(pooling=mode, normalize=False) for mode in _POOLINGS},
    "pooling-cls+mean": _bert_with(pooling=("cls", "mean")),
    "pooling-all": _bert_with(pooling=("mean", *_POOLINGS), normalize=False),
    "prompts": _bert_with(prompts=_PROMPTS, default_prompt_name="query"),
    "prompts-excluded": _bert_with(**_EXCLUDED),
    "prompts-excluded-weightedmean": _bert_with(pooling="weightedmean", **_EXCLUDED),
    "prompts-excluded-left": Family(build=lambda d: _save("qwen3", d, **_EXCLUDED)),
    "dense-tanh": _modules(lambda n: [Pooling(n), dense(n, 20), Normalize()]),
    "dense-identity": _modules(lambda n: [Pooling(n), dense(n, 96, **_LINEAR)]),
    "dense-relu": _modules(lambda n: [Pooling(n), dense(n, 40, activation_function=torch.nn.ReLU())]),
    "dense-gelu": _modules(lambda n: [Pooling(n), dense(n, 40, activation_function=torch.nn.GELU()), Normalize()]),
    "dense-no-bias": _modules(lambda n: [Pooling(n), dense(n, 40, bias=False), Normalize()]),
    "dense-several": _modules(
        lambda n: [Pooling(n), dense(n, 64), dense(64, 40, **_LINEAR), dense(40, 24), Normalize()]
    ),
    "dense-before-pooling": _modules(lambda n: [dense(n, 40, **_TOKENS), Pooling(40), Normalize()]),
    "dense-before-and-after-pooling": _modules(
        lambda n: [dense(n, 40, **_TOKENS, **_LINEAR, bias=False), Pooling(40, "cls"), dense(40, 24)]
    ),
    "dense-residual": _modules(lambda n: [Pooling(n), dense(n, n, use_residual=True), Normalize()]),
    "normalize-dense": _modules(lambda n: [Pooling(n), Normalize(), dense(n, 20)]),
    "layer-norm": _modules(lambda n: [Pooling(n), layer_norm(n), Normalize()]),
    "dropout": _modules(lambda n: [Pooling(n), Dropout(0.5), dense(n, 20)]),
    "no-normalize": _bert_with(normalize=False),
    "truncate-dim": _bert_with(truncate_dim=24),
    "matryoshka": Family(
        build=lambda d: save_st(d, *_small("bert", matryoshka_dimensions=[48, 32, 16]), normalize=False)
    ),
    "weighted-layer-pooling": _modules(
        lambda n: [WeightedLayerPooling(n, num_hidden_layers=2, layer_start=1), Pooling(n)], **_LAYERS
    ),
    "router-first": Family(build=partial(_router, first=True)),
    "router-later": Family(build=partial(_router, first=False)),
    "static": Family(build=_static),
    "static-normalize": Family(build=lambda d: _static(d, Normalize())),
    "word-embeddings": _words(),
    "word-embeddings-cnn": _words(lambda n: CNN(n, out_channels=8, kernel_sizes=[1, 3, 5])),
    "word-embeddings-lstm": _words(lambda n: LSTM(n, 12)),
    "word-weights": _words(lambda _: WordWeights(known_words(), {"vectors": 2.0, "the": 0.1})),
    "bow": Family(build=lambda d: save_modules(d, [BoW(known_words(), {"vectors": 2.0})]), expect="refused"),
}


# --- families: files ----------------------------------------------------------------------------------------


def _edited(edit: Callable[[Path], object], *, expect: Expect = "equal", **options: Any) -> Family:
    """Return a family whose directory is edited after it was written."""

    def build(directory: Path) -> None:
        _save("bert", directory, **options)
        edit(directory)

    return Family(build=build, expect=expect)


def _vocab_only(directory: Path) -> None:
    """Leave only vocab.txt of the tokenizer."""
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    vocabulary = tokenizer("bert").get_vocab()
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    edit_json(directory / "sentence_bert_config.json", max_seq_length=LENGTH)


def _slow_tokenizer(directory: Path) -> None:
    """Leave the files of a tokenizer of transformers 3."""
    _vocab_only(directory)
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "tokenize_chinese_chars": True}
    write_json(directory / "tokenizer_config.json", {**config, "model_max_length": LENGTH, "strip_accents": None})
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    write_json(directory / "special_tokens_map.json", dict(zip(names, BERT, strict=True)))


def _sentencepiece_only(directory: Path) -> None:
    """Replace the tokenizer by a model of sentencepiece."""
    _save("xlm-roberta", directory)
    (directory / "tokenizer.json").unlink()
    config = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": LENGTH}
    write_json(directory / "tokenizer_config.json", config)
    words, model = known_words(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(words[start : start + 8]) for start in range(0, len(words), 4)),
        model_writer=model,
        vocab_size=200,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "sentencepiece.bpe.model").write_bytes(model.getvalue())


def _no_padding_token(directory: Path) -> None:
    model, tokens = _small("llama")
    tokens.pad_token = None
    save_bare(directory, model, tokens)


def _weights_as(directory: Path, dtype: torch.dtype) -> None:
    _small("bert")[0].to(dtype).save_pretrained(directory)


def _bin_weights(directory: Path, prefix: str = "") -> None:
    (directory / "model.safetensors").unlink()
    state = {f"{prefix}{key}": value for key, value in _small("bert")[0].state_dict().items()}
    torch.save(state, directory / "pytorch_model.bin")


def _sharded(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    _small("bert")[0].save_pretrained(directory, max_shard_size="60KB")


def _stale_index(directory: Path) -> None:
    weights = {"pooler.dense.weight": "model-00001-of-00002.safetensors"}
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weights})


def _other_weights(directory: Path) -> None:
    """Add the weights of a variant, and those of another format."""
    shutil.copy(directory / "model.safetensors", directory / "model.fp16.safetensors")
    torch.save({}, directory / "pytorch_model.bin")


def _save_adapter(directory: Path, base: Path) -> None:
    model = transformers.AutoModel.from_pretrained(base, local_files_only=True)
    torch.manual_seed(13)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(directory)


def _lora(directory: Path) -> None:
    """Write an adapter, and its base model next to it."""
    _save_adapter(directory, _save_bare("bert", directory.with_name(f"{directory.name}-base")))
    tokenizer("bert").save_pretrained(directory)


def _lora_with_modules(directory: Path) -> None:
    """Write an adapter like sentence-transformers, which adds the modules."""
    base = _save("bert", directory.with_name(f"{directory.name}-base"), pooling="cls")
    shutil.copytree(base, directory, ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    shutil.copytree(base / "1_Pooling", directory / "1_Pooling", dirs_exist_ok=True)
    _save_adapter(directory, base)


def _modelscope(
    reference: Reference | None, *, repository: str = "test/small", expect: Expect = "equal", **model: Any
) -> Family:
    def build(directory: Path) -> None:
        _save_bare("bert", directory)
        _bin_weights(directory, prefix="bert.")
        configuration = {"framework": "pytorch", "task": "sentence-embedding", "model": {"type": "bert", **model}}
        write_json(directory / "configuration.json", configuration)

    return Family(build=build, reference=reference, repository=repository, expect=expect, max_length=LENGTH)


_CLS, _CLS_NORMALIZED = (by_hand("bert", "BertModel", _first_token, normalize=normalize) for normalize in (False, True))
_GTE = "iic/nlp_gte_sentence-embedding_chinese-base"
_LAYOUTS: dict[str, Family] = {
    "bare-bert": Family(build=lambda d: _save_bare("bert", d)),
    "bare-bert-for-masked-lm": Family(
        build=lambda d: _save_bare("bert", d, head="AutoModelForMaskedLM"), expect="refused"
    ),
    "bare-qwen3-causal-lm": Family(build=lambda d: _save_bare("qwen3", d)),
    "bare-llama-causal-lm": Family(build=lambda d: _save_bare("llama", d)),
    "no-padding-token": Family(
        build=_no_padding_token, reference=by_hand("llama", "AutoModel", _last_token, normalize=False)
    ),
    "do-lower-case": Family(
        build=lambda d: (
            save_st(d, *_small("bert", tokens={"do_lower_case": False})),
            edit_json(d / "sentence_bert_config.json", do_lower_case=True),
        )
    ),
    "max-seq-length-null": _edited(lambda d: edit_json(d / "sentence_bert_config.json", max_seq_length=None)),
    "model-max-length-1e30": _edited(lambda d: edit_json(d / "tokenizer_config.json", model_max_length=int(1e30))),
    "truncation-side-left": Family(build=lambda d: save_st(d, *_small("bert", tokens={"truncation_side": "left"}))),
    "vocab-txt-only": _edited(_vocab_only),
    "slow-tokenizer": _edited(_slow_tokenizer),
    "sentencepiece-only": Family(build=_sentencepiece_only),
    "sentence-transformers-2": Family(
        build=lambda d: (_save_bare("bert", d), write_modules(d, "Transformer", "Pooling", "Normalize"))
    ),
    "weights-fp16": _edited(lambda d: _weights_as(d, torch.float16)),
    "weights-bf16": _edited(lambda d: _weights_as(d, torch.bfloat16)),
    "weights-sharded": _edited(_sharded),
    "weights-bin": _edited(_bin_weights),
    "weights-stale-index": _edited(_stale_index),
    "weights-variant": _edited(_other_weights),
    "lora": Family(build=_lora),
    "lora-with-modules": Family(build=_lora_with_modules),
    "modelscope-gte": _modelscope(_CLS_NORMALIZED, repository=_GTE, emb_pooler_type="cls", normalize=True),
    "modelscope-corom": _modelscope(_CLS),
    "modelscope-mean": _modelscope(by_hand("bert", "BertModel", _mean, normalize=False), emb_pooler_type="avg"),
    "modelscope-avg-first-last": _modelscope(None, emb_pooler_type="avg_first_last", expect="refused"),
    "modelscope-gte-name": Family(
        build=lambda d: _save_bare("bert", d), reference=_CLS_NORMALIZED, repository=_GTE, max_length=LENGTH
    ),
    "pooling-without-modules-json": Family(
        build=lambda d: (_save("bert", d, pooling="cls", normalize=False), (d / "modules.json").unlink()),
        reference=_CLS,
    ),
}


# --- families: not embedding models ----------------------------------------------------------------------------


def _clip(directory: Path) -> None:
    tokens = tokenizer("clip")
    small = {"hidden_size": _WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, **special, "vocab_size": len(tokens), "max_position_embeddings": LENGTH}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(7)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    save_bare(directory, _widen(transformers.CLIPModel(config)), tokens)
    write_json(
        directory / "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 16, "width": 16}},
    )
    write_json(directory / "processor_config.json", {"processor_class": "CLIPProcessor"})
    write_modules(directory, "Transformer", "Normalize")
    modalities = {
        kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("text", "image")
    }
    write_json(
        directory / "sentence_bert_config.json",
        {"modality_config": modalities, "module_output_name": "sentence_embedding"},
    )


def _save_classifier(directory: Path, kind: str, labels: int) -> Path:
    names = {number: f"label {number}" for number in range(labels)}
    numbers = {label: number for number, label in names.items()}
    return _save_bare("bert", directory, head=f"AutoModelFor{kind}", id2label=names, label2id=numbers)


def _refused_classifier(kind: str, labels: int) -> Family:
    return Family(build=lambda directory: _save_classifier(directory, kind, labels), expect="refused")


def _of_kind(kind: Kind, build: Callable[[Path], object], **options: Any) -> Family:
    return Family(build=build, kind=kind, **options)


def _cross_encoder(directory: Path) -> None:
    _save_classifier(directory, "SequenceClassification", 1)
    CrossEncoder(str(directory), device="cpu", local_files_only=True).save_pretrained(str(directory))


def _cross_encoder_3(directory: Path) -> None:
    """Write what sentence-transformers 3 saved."""
    _save_classifier(directory, "SequenceClassification", 1)
    edit_json(directory / "config.json", sbert_ce_default_activation_function="torch.nn.modules.linear.Identity")


def _vision(directory: Path) -> Path:
    small = {"hidden_size": _WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return save_bare(
        directory, transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=8)), None
    )


def _custom_code(directory: Path) -> None:
    edit_json(directory / "config.json", auto_map={"AutoModel": "modeling_own.OwnModel"}, architectures=["OwnModel"])
    code = "from transformers import BertModel\n\n\nclass OwnModel(BertModel):\n    pass\n"
    (directory / "modeling_own.py").write_text(code, encoding="utf-8")


def _adapter(directory: Path) -> None:
    config = {"base_model_name_or_path": "owner/base", "peft_type": "LORA", "r": 4}
    write_json(directory / "adapter_config.json", config)
    save_file({"base_model.model.lora_A.weight": torch.ones(4, 4)}, directory / "adapter_model.safetensors")


def _gguf(directory: Path) -> None:
    write_json(directory / "config.json", {"model_type": "bert", "architectures": ["BertModel"]})
    (directory / "model-q4_k_m.gguf").write_bytes(b"GGUF" + bytes(64))


def _gptq(directory: Path) -> None:
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})


_OTHERS: dict[str, Family] = {
    "clip-text": Family(build=_clip, reference=by_hand("clip", "CLIPModel", _pooled, method="get_text_features")),
    "token-classifier": _refused_classifier("TokenClassification", 5),
    "question-answering": _refused_classifier("QuestionAnswering", 2),
    "vision": Family(build=_vision, expect="refused"),
    "custom-code": _edited(_custom_code, expect="refused"),
    "adapter-without-base": Family(build=_adapter, expect="refused"),
    "gguf": Family(build=_gguf, expect="refused"),
    "gptq": _edited(_gptq, expect="refused"),
}

_KINDS: dict[str, Family] = {
    "cross-encoder": _of_kind("reranker", _cross_encoder),
    "cross-encoder-3": _of_kind("reranker", _cross_encoder_3),
    "reranker-bare": _of_kind("reranker", lambda d: _save_classifier(d, "SequenceClassification", 1)),
    **{f"reranker-{name}": _of_kind("reranker", build) for name, build in kind_models.RERANKERS.items()},
    "reranker-qwen3-bare": _of_kind(
        "reranker",
        kind_models.save_bare_qwen3_reranker,
        repository="Qwen/Qwen3-Reranker-small",
        scores=partial(kind_checks.expected_qwen3_scores, max_length=256),
    ),
    "sequence-classifier": _of_kind("classifier", lambda d: _save_classifier(d, "SequenceClassification", 3)),
    **{f"splade-{name}": _of_kind("sparse", build) for name, build in kind_models.SPARSE.items()},
    "splade-inference-free": _of_kind("sparse", kind_models.save_inference_free_splade),
    "multi-vector": _of_kind("multi-vector", kind_models.save_multi_vector),
    "multi-vector-attended-expansion": _of_kind("multi-vector", kind_models.MULTI_VECTOR["attended expansion"]),
    "colbert-pylate": _of_kind("multi-vector", kind_models.save_pylate),
    "colbert-stanford": _of_kind("multi-vector", kind_models.save_stanford),
    "bge-m3": _of_kind("bge-m3", kind_models.save_bge_m3),
}

FAMILIES: dict[str, Family] = {**_ENCODERS, **_DECODERS, **_PIPELINES, **_LAYOUTS, **_OTHERS, **_KINDS}
"""All families by name, in the order of the tables."""
