"""Small models of other kinds than dense embeddings, made like those of `tests.models`."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import processors
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    XLMRobertaForSequenceClassification,
)

from tests.backends.small_tokenizers import byte_bpe, unigram, wordpiece
from tests.models import bert, modernbert, qwen3, save_bare, save_st, xlm_roberta

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def with_pairs(tokenizer: PreTrainedTokenizerFast, between: str, *, second_type: int = 0) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts special tokens around and between the two texts of a pair."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {between} $B:{second_type} {sep}:{second_type}",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    return tokenizer


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


def save_multi_vector(directory: Path, *, attend: bool = False) -> Path:
    """Write a ColBERT directory of sentence-transformers: query expansion, a skip list, and prompts."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize

    tokenizer = wordpiece()
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


def save_pylate(directory: Path) -> Path:
    """Write the directory of an older PyLate: its settings are in config_sentence_transformers.json."""
    save_multi_vector(directory)
    modules = json.loads((directory / "modules.json").read_text())
    kept = [
        {**module, "type": kind}
        for module, kind in zip(
            modules, ("sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"), strict=False
        )
    ]
    (directory / "modules.json").write_text(json.dumps(kept))
    config = {
        "model_type": "ColBERT", "query_prefix": "[CLS] ", "document_prefix": "[SEP] ", "query_length": 16,
        "document_length": 40, "attend_to_expansion_tokens": False, "skiplist_words": [".", ","],
    }  # fmt: skip
    (directory / "config_sentence_transformers.json").write_text(json.dumps(config))
    path = directory / "sentence_bert_config.json"
    settings = json.loads(path.read_text())
    for key in ("query_expansion", "document_length", "query_length"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings))
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
SPARSE: dict[str, Callable[[Path], Path]] = {
    "bert": lambda d: save_splade(d, bert, BertForMaskedLM, wordpiece()),
    "modernbert": lambda d: save_splade(d, modernbert, ModernBertForMaskedLM, byte_bpe()),
}
MULTI_VECTOR: dict[str, Callable[[Path], Path]] = {
    "sentence-transformers": save_multi_vector,
    "attended expansion": lambda d: save_multi_vector(d, attend=True),
    "PyLate": save_pylate,
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
