"""Small models of other kinds than dense embeddings, made like those of `tests.models`."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaForSequenceClassification,
)

from tests.backends.small_tokenizers import byte_bpe, unigram, wordpiece
from tests.models import bert, modernbert, qwen3, save_bare, save_st, xlm_roberta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel


def with_pairs(tokenizer: PreTrainedTokenizerFast, between: str, *, second_type: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts special tokens around and between the two texts of a pair."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {between} $B:{second_type} {sep}:{second_type}",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    return tokenizer


def with_words(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer with further words in its vocabulary, which are no special tokens."""
    contents = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = contents["model"]["vocab"]
    vocabulary.update({word: len(vocabulary) + index for index, word in enumerate(words)})
    names = ("unk_token", "cls_token", "sep_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(contents)),
        model_max_length=tokenizer.model_max_length,
        **{name: getattr(tokenizer, name) for name in names},
    )


def bert_pairs() -> PreTrainedTokenizerFast:
    return with_pairs(wordpiece(), "[SEP]", second_type=1)


def roberta_pairs() -> PreTrainedTokenizerFast:
    return with_pairs(unigram(), "</s> </s>")


def modernbert_pairs() -> PreTrainedTokenizerFast:
    tokenizer = with_pairs(byte_bpe(), "[SEP]")
    tokenizer.model_max_length = 128  # of 48 bytes, a query in Chinese takes nearly all
    return tokenizer


def classifier(
    base: Callable[[PreTrainedTokenizerFast], PreTrainedModel], head: Any, *, labels: int = 1
) -> Callable[[PreTrainedTokenizerFast], PreTrainedModel]:
    """Return a function that makes a sequence classifier with the configuration of a base model."""

    def build(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        config = base(tokenizer).config
        config.num_labels = labels
        torch.manual_seed(5)
        model = head(config)
        # A wide last layer, so that different pairs have clearly different scores.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("classifier.weight", "out_proj.weight", "score.weight")):
                    parameter.mul_(3)
        return model

    return build


def save_bert_reranker(directory: Path) -> Path:
    save_bare(directory, classifier(bert, BertForSequenceClassification), bert_pairs())
    # As in the tokenizers of BERT. `save_pretrained` writes it for classes of transformers only.
    path = directory / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    return directory


def save_causal_reranker(directory: Path) -> Path:
    """Write a Qwen3 that answers yes or no, with the modules and the chat template of sentence-transformers."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    tokenizer = byte_bpe(around=("", ""), padding_side="left", chat_template=RERANK_TEMPLATE)
    tokenizer.model_max_length = 256
    bare = save_bare(directory.with_name(f"{directory.name}-bare"), qwen3, tokenizer)
    transformer = Transformer(str(bare), transformer_task="text-generation", config_kwargs={"local_files_only": True})
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("y", "n"))
    model = CrossEncoder(
        modules=[transformer, LogitScore(yes, no)],
        device="cpu",
        prompts={"search": "find it"},
        default_prompt_name="search",
        local_files_only=True,
    )
    model.save_pretrained(str(directory), create_model_card=False)
    shutil.rmtree(bare)
    return directory


def save_bare_qwen3_reranker(directory: Path) -> Path:
    """Write a directory like that of Qwen3-Reranker: without files of sentence-transformers, and with a template for chats."""
    tokenizer = byte_bpe(around=("", ""), chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]})
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.model_max_length = 512
    return save_bare(directory, qwen3, tokenizer)


def save_splade(
    directory: Path, base: Callable[..., PreTrainedModel], head: Any, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Write a SPLADE directory of sentence-transformers."""
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(
        modules=_splade_modules(directory, base, head, tokenizer), device="cpu", local_files_only=True
    )
    model.save_pretrained(str(directory), create_model_card=False)
    return directory


def save_inference_free_splade(directory: Path) -> Path:
    """Write a SPLADE whose queries have the weights of a table, as in OpenSearch's models."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    tokenizer = wordpiece()
    documents = _splade_modules(directory, bert, BertForMaskedLM, tokenizer)
    torch.manual_seed(3)
    weights = torch.rand(len(tokenizer)) * 3
    queries = [SparseStaticEmbedding(tokenizer=tokenizer, weight=weights)]
    router = Router.for_query_document(query_modules=queries, document_modules=documents)
    model = SparseEncoder(modules=[router], device="cpu", local_files_only=True)
    model.save_pretrained(str(directory), create_model_card=False)
    return directory


def _splade_modules(
    directory: Path, base: Callable[..., PreTrainedModel], head: Any, tokenizer: PreTrainedTokenizerFast
) -> list[torch.nn.Module]:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    bare = directory.with_name(f"{directory.name}-bare")
    save_bare(bare, lambda each: head(base(each).config), tokenizer)
    transformer = Transformer(str(bare), transformer_task="fill-mask", config_kwargs={"local_files_only": True})
    return [transformer, SpladePooling("max")]


def save_multi_vector(
    directory: Path, *, attend: bool = False, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """Write a ColBERT directory of sentence-transformers: query expansion, a skip list, and prompts."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize

    tokenizer = tokenizer or wordpiece()
    tokenizer.mask_token = "[UNK]"  # the vocabulary has no [MASK]
    bare = save_bare(directory.with_name(f"{directory.name}-bare"), bert, tokenizer)
    transformer = Transformer(
        str(bare),
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
        config_kwargs={"local_files_only": True},
        document_length=40,
        query_expansion={"strategy": "fixed", "attend": attend, "length": 16},
    )
    torch.manual_seed(9)
    projection = Dense(
        48, 16, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"
    )
    modules = [transformer, projection, MultiVectorMask([".", "a", ","]), Normalize("token_embeddings")]
    model = MultiVectorEncoder(
        modules=modules, device="cpu", prompts={"query": "q: ", "document": "d: "}, local_files_only=True
    )
    model.save_pretrained(str(directory), create_model_card=False)
    shutil.rmtree(bare)
    return directory


def save_pylate(directory: Path, *, markers: tuple[str, str] = ("[CLS] ", "[SEP] ")) -> Path:
    """Write the directory of an older PyLate: its settings are in config_sentence_transformers.json.

    If the tokenizer does not have the markers, it gets them as PyLate adds them: as tokens of normalized texts.
    """
    tokenizer = wordpiece()
    tokenizer.add_tokens([marker for marker in markers if marker.strip() not in tokenizer.get_vocab()])
    save_multi_vector(directory, tokenizer=tokenizer)
    modules = json.loads((directory / "modules.json").read_text())
    kept = [
        {**module, "type": kind}
        for module, kind in zip(
            modules, ("sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"), strict=False
        )
    ]
    (directory / "modules.json").write_text(json.dumps(kept))
    config = {
        "model_type": "ColBERT", "query_prefix": markers[0], "document_prefix": markers[1], "query_length": 16,
        "document_length": 40, "attend_to_expansion_tokens": False, "skiplist_words": [".", ","],
    }  # fmt: skip
    (directory / "config_sentence_transformers.json").write_text(json.dumps(config))
    path = directory / "sentence_bert_config.json"
    settings = json.loads(path.read_text())
    for key in ("query_expansion", "document_length", "query_length"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings))
    return directory


def save_stanford(directory: Path, *, punctuation: bool = True) -> Path:
    """Write a directory like that of ColBERTv2: the projection is among the weights, the settings in artifact.metadata."""
    markers = ["[unused0]", "[unused1]"]
    tokenizer = with_words(wordpiece(), markers)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    save_bare(directory, bert, tokenizer)
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(9)
    projection = torch.randn(16, 48)
    save_file(
        {**{f"bert.{name}": weight for name, weight in weights.items()}, "linear.weight": projection},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["HF_ColBERT"]}))
    metadata = {
        "query_token_id": markers[0], "doc_token_id": markers[1], "query_maxlen": 16, "doc_maxlen": 40, "dim": 16,
        "attend_to_mask_tokens": False, "mask_punctuation": punctuation,
    }  # fmt: skip
    (directory / "artifact.metadata").write_text(json.dumps(metadata))
    return directory


def save_bge_m3(directory: Path) -> Path:
    """Write a directory like that of BGE-M3: a dense model, with the weights of two more outputs beside it."""
    save_st(directory, xlm_roberta, unigram(), pooling="cls")
    torch.manual_seed(13)
    for name, width in (("sparse_linear.pt", 1), ("colbert_linear.pt", 48)):
        torch.save(torch.nn.Linear(48, width).state_dict(), directory / name)
    return directory


RERANK_TEMPLATE = (
    "<s>Judge. {% for message in messages if message.role == 'system' %}Task: {{ message.content }}{% endfor %}\n"
    "Query: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "Document: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}\nAnswer:"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As in Qwen3: nothing in it is for a query and a document."""
SPARSE: dict[str, Callable[[Path], Path]] = {
    "bert": lambda d: save_splade(d, bert, BertForMaskedLM, wordpiece()),
    "modernbert": lambda d: save_splade(d, modernbert, ModernBertForMaskedLM, byte_bpe()),
}
MULTI_VECTOR: dict[str, Callable[[Path], Path]] = {
    "sentence-transformers": save_multi_vector,
    "attended expansion": lambda d: save_multi_vector(d, attend=True),
    "PyLate": save_pylate,
    "PyLate with added markers": lambda d: save_pylate(d, markers=("[Q] ", "[D] ")),
    "Stanford": save_stanford,
    "Stanford with punctuation": lambda d: save_stanford(d, punctuation=False),
}
CLASSIFIERS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda d: save_bare(d, classifier(bert, BertForSequenceClassification, labels=3), bert_pairs())
}
RERANKERS: dict[str, Callable[[Path], Path]] = {
    "bert": save_bert_reranker,
    "xlm-roberta": lambda d: save_bare(
        d, classifier(xlm_roberta, XLMRobertaForSequenceClassification), roberta_pairs()
    ),
    "modernbert": lambda d: save_bare(
        d, classifier(modernbert, ModernBertForSequenceClassification), modernbert_pairs()
    ),
    "qwen3": save_causal_reranker,
}
ONE_OF_EACH: dict[str, Callable[[Path], Path]] = {
    "reranker": RERANKERS["bert"],
    "causal reranker": RERANKERS["qwen3"],
    "classifier": CLASSIFIERS["bert"],
    "sparse": SPARSE["bert"],
    "multi-vector": MULTI_VECTOR["sentence-transformers"],
    "bge-m3": save_bge_m3,
}
"""A model of each kind other than dense."""
