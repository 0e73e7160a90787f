"""Recognizes what kind of model a repository contains, and rejects those that are not embedding models.

sentence-transformers loads almost any model, and averages its token vectors if it finds nothing else. It reads JSON files
only, and imports no runtime.
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

TRUST_ADVICE = (
    "If you trust it, set EMB_PROVIDER_TRUST_REMOTE_CODE=true (ModelScope: "
    'EMB_PROVIDER_MODELSCOPE_TRUST_REMOTE_CODE), or the key "trust_remote_code" of this model in '
    "EMB_PROVIDER_MODEL_MAPPING."
)
POOLING_ADVICE = 'the keys "pooling" and "normalize" of this model in EMB_PROVIDER_MODEL_MAPPING'

ADOPTED_TYPES = frozenset({"eurobert", "gte", "jina_embeddings_v3", "lfm2", "modernbert", "nomic_bert"})
"""Model types that were published as code in a repository and are part of transformers now. Of other types, the code in
a repository is a model of its own, such as Jina's BERT or GTE's Qwen2 without a causal mask."""


class _Kind(NamedTuple):
    what: str
    """What it is, as a noun phrase."""
    advice: str


_EMBEDDING = "Choose an embedding model."
_RERANKER = _Kind("a reranker (a cross-encoder)", f"It scores pairs of texts and makes no vectors. {_EMBEDDING}")
_CLASSIFIER = _Kind("a text classifier", f"Its vectors are not made for search. {_EMBEDDING}")
_TOKEN_CLASSIFIER = _Kind("a token classifier", f"It labels the words of a text. {_EMBEDDING}")
_ANSWERS = _Kind("a model that answers questions about a text", _EMBEDDING)
_SPARSE = _Kind(
    "a sparse model (such as SPLADE)",
    f"It makes one weight per token of its vocabulary, not a dense vector. {_EMBEDDING}",
)
_MULTI_VECTOR = _Kind(
    "a multi-vector model (such as ColBERT)", f"It makes one vector per token, not one per text. {_EMBEDDING}"
)
_IMAGES = _Kind("a model of images", f"It does not read text. {_EMBEDDING}")
_AUDIO = _Kind("a model of audio", f"It does not read text. {_EMBEDDING}")

_ST_TYPES = {"CrossEncoder": _RERANKER, "SparseEncoder": _SPARSE, "MultiVectorEncoder": _MULTI_VECTOR}
"""Values of `model_type` in `config_sentence_transformers.json`."""
_ARCHITECTURES: tuple[tuple[str, _Kind], ...] = (
    ("ForTokenClassification", _TOKEN_CLASSIFIER),
    ("ForQuestionAnswering", _ANSWERS),
    ("ForMultipleChoice", _ANSWERS),
    ("ForNextSentencePrediction", _CLASSIFIER),
    ("ForImageClassification", _IMAGES),
    ("ForObjectDetection", _IMAGES),
    ("ForSemanticSegmentation", _IMAGES),
    ("ForAudioClassification", _AUDIO),
    ("ForCTC", _AUDIO),
    ("ForSpeechSeq2Seq", _AUDIO),
    ("ForRetrieval", _MULTI_VECTOR),
    ("ColBERT", _MULTI_VECTOR),
)
"""Ends of class names in `architectures`. Sequence classifiers are distinguished by their number of labels."""
_CLASSIFIES_SEQUENCES = ("ForSequenceClassification", "ForSequenceRegression", "ForReward")
_PREDICTS_TOKENS = ("ForMaskedLM", "ForPreTraining", "LMHeadModel")
_TASKS = {
    "text-ranking": _RERANKER,
    "reranking": _RERANKER,
    "text-classification": _CLASSIFIER,
    "sentiment-classification": _CLASSIFIER,
    "zero-shot-classification": _CLASSIFIER,
    "nli": _CLASSIFIER,
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
_ADAPTER_TASKS = {"SEQ_CLS": _CLASSIFIER, "TOKEN_CLS": _TOKEN_CLASSIFIER, "QUESTION_ANS": _ANSWERS}
_MODULES = {"SpladePooling": _SPARSE, "SparseAutoEncoder": _SPARSE, "MLMTransformer": _SPARSE, "pylate": _MULTI_VECTOR}
"""Parts of the class names of modules."""
_SPARSE_WORDS = re.compile(r"splade|sparse[-_]encod|neural-sparse", re.IGNORECASE)
_CARD_TASK = re.compile(r"^pipeline_tag:\s*[\"']?([\w-]+)", re.MULTILINE)


def require_embedding_model(
    repository: Repository, st_config: Mapping[str, Any], tasks: Iterable[str], *, pooling: str | None
) -> None:
    """Raise UnsupportedModelError if a repository does not contain an embedding model.

    Args:
        repository: The repository.
        st_config: Its `config_sentence_transformers.json`.
        tasks: The tasks in its `configuration.json`.
        pooling: The pooling that the settings or ModelScope's configuration choose: then a masked language model is
            used as an embedding model on purpose.
    """
    _reject_quantized(repository)
    kind = _declared_kind(repository, st_config)
    if kind is None and not repository.has_modules:
        kind = next(_kinds_of_bare(repository, tasks), None)
    if kind is not None:
        raise UnsupportedModelError(f"{repository.name} is {kind.what}, not an embedding model. {kind.advice}")
    architecture = architecture_of(repository.config)
    if pooling is None and not repository.has_modules and architecture.endswith(_PREDICTS_TOKENS):
        raise UnsupportedModelError(
            f"{repository.name} is a language model ({architecture}) and does not say how its vectors are made: it has "
            "no modules.json. It can be a sparse model (SPLADE), or a model that was not trained for embeddings. If its "
            f"card says how embeddings are made, set {POOLING_ADVICE}."
        )


def require_own_class(repository: Repository, *, trust_remote_code: bool) -> None:
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
        if file != "modules.json" and (adopted or not _decides_vectors(repository, file, reference)):
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


def _decides_vectors(repository: Repository, file: str, reference: str) -> bool:
    auto_map = repository.read(file).get("auto_map")
    if not isinstance(auto_map, dict):
        return True
    keys = {key for key, value in auto_map.items() if reference in (value if isinstance(value, list) else [value])}
    return bool(keys & {"AutoConfig", "AutoModel", "AutoTokenizer"})


def _declared_kind(repository: Repository, st_config: Mapping[str, Any]) -> _Kind | None:
    """Return the kind that the repository names itself, whatever else it contains."""
    model_type = st_config.get("model_type", "SentenceTransformer")
    if model_type != "SentenceTransformer":
        return _ST_TYPES.get(
            model_type, _Kind(f"a {model_type}", f"It does not make one vector per text. {_EMBEDDING}")
        )
    if isinstance(repository.config.get("sentence_transformers"), dict):  # written by CrossEncoder only
        return _RERANKER
    for module in repository.modules:
        for part, kind in _MODULES.items():
            if part in str(module.get("type", "")):
                return kind
    return None


def _kinds_of_bare(repository: Repository, tasks: Iterable[str]) -> Iterator[_Kind]:
    """Yield the kinds that a repository without modules can be recognized as."""
    config = repository.config
    architecture = architecture_of(config)
    if architecture.endswith(_CLASSIFIES_SEQUENCES):
        labels = config.get("num_labels", len(config.get("id2label") or [1, 2]))
        yield _RERANKER if labels == 1 else _CLASSIFIER
    yield from (kind for end, kind in _ARCHITECTURES if architecture.endswith(end))
    if repository.adapter:
        task = read_object(repository.adapter[ADAPTER_CONFIG]).get("task_type")
        if task in _ADAPTER_TASKS:
            yield _ADAPTER_TASKS[task]
    declared = [*tasks, *_CARD_TASK.findall(repository.card)]
    yield from (_TASKS[task] for task in declared if task in _TASKS)
    if architecture.endswith(_PREDICTS_TOKENS) and _SPARSE_WORDS.search(f"{repository.name}\n{repository.card}"):
        yield _SPARSE


def _reject_quantized(repository: Repository) -> None:
    quantization = repository.config.get("quantization_config")
    if not isinstance(quantization, dict):
        return
    method = str(quantization.get("quant_method") or "an unknown method")
    raise UnsupportedModelError(
        f"{repository.name} has weights that are quantized with {method.upper()}, which cannot be loaded here. Choose the "
        "repository with the original weights, and set EMB_PROVIDER_MODEL_PRECISION to int8 or int4."
    )
