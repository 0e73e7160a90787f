"""Recognizes what kind of model a repository contains, and rejects the kinds that are not served.

sentence-transformers loads almost any model, and averages its token vectors if it finds nothing else. Nothing here imports
a runtime: only names and JSON files are read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from emb_model_provider.backends.repository import read_object
from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.snapshots.weights import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from emb_model_provider.backends.repository import Repository
    from emb_model_provider.model_spec import Kind

TRUST_ADVICE = (
    "If you trust it, set EMB_PROVIDER_TRUST_REMOTE_CODE=true (ModelScope: "
    'EMB_PROVIDER_MODELSCOPE_TRUST_REMOTE_CODE), or the key "trust_remote_code" of this model in '
    "EMB_PROVIDER_MODEL_MAPPING."
)
POOLING_ADVICE = 'the keys "pooling" and "normalize" of this model in EMB_PROVIDER_MODEL_MAPPING'
KIND_ADVICE = 'the key "kind" of this model in EMB_PROVIDER_MODEL_MAPPING'

ADOPTED_TYPES = frozenset({"eurobert", "gte", "jina_embeddings_v3", "lfm2", "modernbert", "nomic_bert"})
"""Model types that were published as code in a repository and are part of transformers now. Of other types, the code in
a repository is a model of its own, such as Jina's BERT or GTE's Qwen2 without a causal mask."""


class _Other(NamedTuple):
    """A kind of model that is not served."""

    what: str
    """What it is, as a noun phrase."""
    advice: str


_CHOOSE = "Choose a model for embeddings, reranking or classification of texts."
_TOKEN_CLASSIFIER = _Other("a token classifier", f"It labels the words of a text. {_CHOOSE}")
_ANSWERS = _Other("a model that answers questions about a text", _CHOOSE)
_IMAGES = _Other("a model of images", f"It does not read text. {_CHOOSE}")
_AUDIO = _Other("a model of audio", f"It does not read text. {_CHOOSE}")
_PAGES = _Other("a multi-vector model of images of pages", f"Its documents are images. {_CHOOSE}")
_AUTOENCODER = _Other("a sparse autoencoder of dense vectors", f"Its indices are no tokens. {_CHOOSE}")

_ST_TYPES: Mapping[str, Kind] = {
    "SparseEncoder": "sparse",
    "MultiVectorEncoder": "multi-vector",
    "ColBERT": "multi-vector",
}
"""Values of `model_type` in `config_sentence_transformers.json`; a CrossEncoder is distinguished by its labels."""
_MODULES: Mapping[str, Kind | _Other] = {
    "SparseAutoEncoder": _AUTOENCODER,
    "SpladePooling": "sparse",
    "SparseStaticEmbedding": "sparse",
    "MLMTransformer": "sparse",
    "LogitScore": "reranker",
    "MultiVectorMask": "multi-vector",
    "pylate": "multi-vector",
}
"""Parts of the class names of modules."""
_ARCHITECTURES: tuple[tuple[str, Kind | _Other], ...] = (
    ("HF_ColBERT", "multi-vector"),
    ("ForTokenClassification", _TOKEN_CLASSIFIER),
    ("ForQuestionAnswering", _ANSWERS),
    ("ForMultipleChoice", _ANSWERS),
    ("ForNextSentencePrediction", _ANSWERS),
    ("ForImageClassification", _IMAGES),
    ("ForObjectDetection", _IMAGES),
    ("ForSemanticSegmentation", _IMAGES),
    ("ForAudioClassification", _AUDIO),
    ("ForCTC", _AUDIO),
    ("ForSpeechSeq2Seq", _AUDIO),
    ("ForRetrieval", _PAGES),
)
"""Ends of class names in `architectures`. Sequence classifiers are distinguished by their number of labels."""
_CLASSIFIES_SEQUENCES = ("ForSequenceClassification", "ForSequenceRegression", "ForReward")
_PREDICTS_TOKENS = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
GENERATES = ("ForCausalLM", "LMHeadModel")
"""Ends of the class names of causal language models."""
_RERANKING, _CLASSIFYING = "reranking", "classification"
_TASKS: Mapping[str, str | _Other] = {
    "text-ranking": _RERANKING,
    "reranking": _RERANKING,
    "text-classification": _CLASSIFYING,
    "sentiment-classification": _CLASSIFYING,
    "zero-shot-classification": _CLASSIFYING,
    "nli": _CLASSIFYING,
    "token-classification": _TOKEN_CLASSIFIER,
    "named-entity-recognition": _TOKEN_CLASSIFIER,
    "word-segmentation": _TOKEN_CLASSIFIER,
    "part-of-speech": _TOKEN_CLASSIFIER,
    "question-answering": _ANSWERS,
    "image-classification": _IMAGES,
    "object-detection": _IMAGES,
    "automatic-speech-recognition": _AUDIO,
}
"""Tasks in ModelScope's `configuration.json` and in the metadata of model cards."""
_ADAPTER_TASKS: Mapping[str, str | _Other] = {
    "SEQ_CLS": _CLASSIFYING,
    "TOKEN_CLS": _TOKEN_CLASSIFIER,
    "QUESTION_ANS": _ANSWERS,
}
BGE_M3_HEADS = ("sparse_linear.pt", "colbert_linear.pt")
"""Weights of the sparse and the multi-vector output of BGE-M3."""
_RERANKER_NAME = re.compile(r"rerank", re.IGNORECASE)
_SPARSE_WORDS = re.compile(r"splade|sparse[-_]encod|neural-sparse", re.IGNORECASE)
_CARD_TASK = re.compile(r"^pipeline_tag:\s*[\"']?([\w-]+)", re.MULTILINE)
_MODEL_CLASSES: Mapping[Kind, tuple[str, ...]] = {
    "reranker": ("AutoModelForSequenceClassification", "AutoModelForCausalLM"),
    "classifier": ("AutoModelForSequenceClassification",),
    "sparse": ("AutoModelForMaskedLM",),
}
"""Keys of `auto_map` for the class that a kind loads, besides AutoModel."""


def recognize_kind(
    repository: Repository,
    st_config: Mapping[str, Any],
    tasks: Iterable[str],
    *,
    requested: Kind | None,
    pooling: str | None,
) -> Kind:
    """Return what a model computes.

    Args:
        repository: The repository.
        st_config: Its `config_sentence_transformers.json`.
        tasks: The tasks in its `configuration.json`.
        requested: The kind that the settings choose.
        pooling: The pooling that the settings or ModelScope's configuration choose: then a masked language model is
            used as an embedding model on purpose.

    Raises:
        UnsupportedModelError: It is of a kind that is not served, or cannot be of the requested one.
    """
    _reject_quantized(repository)
    kind = _declared_kind(repository, st_config)
    if kind is None and not repository.has_modules:
        kind = next(_kinds_of_bare(repository, tasks), None)
    if requested is not None and requested != kind:
        _require_possible(repository, requested, kind)
        return requested
    if isinstance(kind, _Other):
        raise UnsupportedModelError(f"{repository.name} is {kind.what}, which is not served. {kind.advice}")
    architecture = architecture_of(repository.config)
    if kind is None and pooling is None and not repository.has_modules and architecture.endswith(_PREDICTS_TOKENS):
        raise UnsupportedModelError(
            f"{repository.name} is a language model ({architecture}) and does not say how its vectors are made: it has "
            f'no modules.json. It can be a sparse model (SPLADE): then set {KIND_ADVICE} to "sparse". Or it was not '
            f"trained for embeddings. If its card says how embeddings are made, set {POOLING_ADVICE}."
        )
    return kind or "dense"


def require_own_class(repository: Repository, kind: Kind, *, trust_remote_code: bool) -> None:
    """Raise UnsupportedModelError if the class of a model is code that must not run, or that is not here.

    Without trust, transformers would silently load its own class of the same model type.
    """
    if trust_remote_code:
        for file, reference in repository.code_references():
            owner, separator, _ = reference.partition("--")
            if separator and owner not in repository.code:
                raise UnsupportedModelError(
                    f"{repository.name} needs code from the repository {owner} ({reference} in {file}), which was not "
                    f"downloaded with it. Download it again: `emb-provider pull {repository.name} --force`."
                )
        return
    adopted = repository.config.get("model_type") in ADOPTED_TYPES
    for file, reference in repository.code_references():
        if file != "modules.json" and (adopted or not _decides_results(repository, kind, file, reference)):
            continue
        raise UnsupportedModelError(
            f"{repository.name} needs code from {_place(reference)} to run ({reference} in {file}). {TRUST_ADVICE}"
        )


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the class that a `config.json` declares, or an empty string."""
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _place(reference: str) -> str:
    owner, separator, _ = reference.partition("--")
    return f"the repository {owner}" if separator else "its repository"


def _decides_results(repository: Repository, kind: Kind, file: str, reference: str) -> bool:
    auto_map = repository.read(file).get("auto_map")
    if not isinstance(auto_map, dict):
        return True
    keys = {key for key, value in auto_map.items() if reference in (value if isinstance(value, list) else [value])}
    return bool(keys & {"AutoConfig", "AutoModel", "AutoTokenizer", *_MODEL_CLASSES.get(kind, ())})


def _declared_kind(repository: Repository, st_config: Mapping[str, Any]) -> Kind | _Other | None:
    """Return the kind that the repository names itself, whatever else it contains."""
    model_type = st_config.get("model_type", "SentenceTransformer")
    if model_type == "CrossEncoder" or isinstance(repository.config.get("sentence_transformers"), dict):
        # The key in config.json is written by CrossEncoder only.
        return _by_labels(repository)
    if model_type != "SentenceTransformer":
        unknown = _Other(f"a {model_type} of sentence-transformers", f"That is not known here. {_CHOOSE}")
        return _ST_TYPES.get(model_type, unknown)
    types = [str(module.get("type", "")) for module in repository.nested_modules]
    for part, kind in _MODULES.items():
        if any(part in name for name in types):
            return kind
    return "bge-m3" if all(name in repository.files for name in BGE_M3_HEADS) else None


def _by_labels(repository: Repository) -> Kind:
    config = repository.config
    if architecture_of(config).endswith(GENERATES):
        return "reranker"
    labels = config.get("num_labels", len(config.get("id2label") or [1, 2]))
    for module in repository.modules:
        if str(module.get("type", "")).endswith(".Dense"):
            labels = repository.read(f"{str(module.get('path')).strip('./')}/config.json").get("out_features", labels)
    return "reranker" if labels == 1 else "classifier"


def _kinds_of_bare(repository: Repository, tasks: Iterable[str]) -> Iterator[Kind | _Other]:
    """Yield the kinds that a repository without modules can be recognized as."""
    architecture = architecture_of(repository.config)
    if architecture.endswith(_CLASSIFIES_SEQUENCES):
        yield _by_labels(repository)
    yield from (kind for end, kind in _ARCHITECTURES if architecture.endswith(end))
    declared = [*tasks, *_CARD_TASK.findall(repository.card)]
    if repository.adapter:
        task = _ADAPTER_TASKS.get(str(read_object(repository.adapter[ADAPTER_CONFIG]).get("task_type")))
        if task is not None:
            yield _without_head(task, architecture)
    for name in declared:
        if (found := _TASKS.get(name)) is not None:
            if found == _RERANKING and architecture.endswith(GENERATES):
                yield "reranker"
            yield _without_head(found, architecture)
    if architecture.endswith(GENERATES) and _RERANKER_NAME.search(repository.name):
        yield "reranker"
    if architecture.endswith(_PREDICTS_TOKENS) and _SPARSE_WORDS.search(f"{repository.name}\n{repository.card}"):
        yield "sparse"


def _without_head(found: str | _Other, architecture: str) -> _Other:
    """Return the kind of a model whose task needs a head, and whose class has none."""
    if isinstance(found, _Other):
        return found
    return _Other(
        f"a model for {found} by its description, but its class {architecture or '(none is declared)'} has no output for it",
        f'If it is an embedding model, set {KIND_ADVICE} to "dense".',
    )


def _require_possible(repository: Repository, requested: Kind, recognized: Kind | _Other | None) -> None:
    """Raise UnsupportedModelError if the settings choose a kind that the files cannot be."""
    architecture = architecture_of(repository.config)
    is_other_encoder = recognized not in (None, "dense") and repository.has_modules
    possible: Mapping[Kind, bool] = {
        # A reranker or classifier is never averaged into something like an embedding.
        "dense": not architecture.endswith(_CLASSIFIES_SEQUENCES) and (recognized == "bge-m3" or not is_other_encoder),
        "reranker": architecture.endswith((*_CLASSIFIES_SEQUENCES, *GENERATES)) and not repository.has_modules,
        "classifier": architecture.endswith(_CLASSIFIES_SEQUENCES) and not repository.has_modules,
        "sparse": architecture.endswith(_PREDICTS_TOKENS) and not repository.has_modules,
        "multi-vector": False,
        "bge-m3": all(name in repository.files for name in BGE_M3_HEADS),
    }
    if not possible[requested]:
        is_what = recognized.what if isinstance(recognized, _Other) else f"of the kind {recognized or 'dense'!r}"
        raise UnsupportedModelError(
            f"{repository.name} cannot be served as the kind {requested!r}: by its files it is {is_what} "
            f"({architecture or 'no class is declared'}). Change or remove {KIND_ADVICE}."
        )


def _reject_quantized(repository: Repository) -> None:
    quantization = repository.config.get("quantization_config")
    if not isinstance(quantization, dict):
        return
    method = str(quantization.get("quant_method") or "an unknown method")
    raise UnsupportedModelError(
        f"{repository.name} has weights that are quantized with {method.upper()}, which cannot be loaded here. Choose the "
        "repository with the original weights, and the precision int8 or int4: `--precision`, or EMB_PROVIDER_MODEL_PRECISION."
    )
