"""Options of a request: its prompt, and the dimensions and length of its vectors."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.errors import DimensionsError, LoadError, RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Activation, ModelDescription
    from emb_model_provider.model_spec import ModelSpec

_MIN_NORM = np.float32(1e-12)
"""As in torch.nn.functional.normalize, so that a zero vector stays zero."""
_PROMPT_SYNONYMS = (
    ("query", "search_query", "retrieval.query"),
    ("document", "passage", "search_document", "retrieval.passage", "corpus"),
)
"""Names of the two sides of a search in common APIs. The names of a line are interchangeable."""


_INSTRUCTIONS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"(Instruct: ?)(.+?)(\s*\n *Query: ?)",
        r"(<instruct>)(.+?)(\n<query>)",
        r"(task: )(.+?)( \| query: )",
    )
)
"""Prompts that contain an instruction, with the text before and after it: those of Qwen3, E5 and GTE; of BGE-ICL; of
EmbeddingGemma."""


_OTHER_TASKS = ("classification", "clustering", "text-matching", "separation")
"""Other tasks of common APIs. A model that has no prompt for them computes the same vectors as without a task."""
_OTHER_TASKS_PREFIX = "code."


def choose_task(input_type: str | None, description: ModelDescription) -> str | None:
    """Return the task that decides the route of an asymmetric model, or the rules of a multi-vector model, or None.

    Raises:
        RequestError: The model has no default route, and no route for `input_type`.
    """
    routes = description.routes
    if not routes:
        # A multi-vector model has rules for queries and documents.
        side = next((names[0] for names in _PROMPT_SYNONYMS if input_type in names), None)
        return side if description.kind == "multi-vector" else None
    names = _synonyms(input_type) if input_type is not None else ()
    task = next((name for name in (input_type, *names) if name in routes), description.default_route)
    if task is None:
        supported = ", ".join(f"'{name}'" for name in routes)
        raise RequestError(
            "This model has different parts for queries and documents: set 'input_type'. "
            f"Supported values: [{supported}].",
            param="input_type",
        )
    return task


def choose_prompt(input_type: str | None, description: ModelDescription, instruction: str | None = None) -> str:
    """Return the text to put before each input; empty for none.

    `input_type` is the name of a prompt or of a route, or a synonym of `query` or `document`. The default prompt applies
    if it is None, or if the model has no prompt for the synonym. An instruction replaces that of the prompt. If no prompt
    of the model contains one, the instruction is the prompt.

    Raises:
        RequestError: The model has no such prompt, or only its other prompts contain an instruction.
    """
    prompt = _choose_prompt(input_type, description)
    if instruction is None:
        return prompt
    candidates = (prompt, *description.prompts.values()) if input_type is None else (prompt,)
    for candidate in candidates:
        for pattern in _INSTRUCTIONS:
            if match := pattern.fullmatch(candidate):
                return f"{match[1]}{instruction}{match[3]}"
    with_instruction = [
        name for name, text in description.prompts.items() if any(each.fullmatch(text) for each in _INSTRUCTIONS)
    ]
    if with_instruction:
        raise RequestError(
            f"This model has no instruction for 'input_type' = {(input_type or '')[:100]!r}. Values of 'input_type' with an "
            f"instruction: [{', '.join(map(repr, with_instruction))}].",
            param="instruction",
        )
    return instruction


def _choose_prompt(input_type: str | None, description: ModelDescription) -> str:
    prompts, default = description.prompts, description.default_prompt
    if input_type is not None:
        if input_type in prompts:
            return prompts[input_type]
        synonyms = _synonyms(input_type)
        if not synonyms and input_type not in description.routes and not _is_other_task(input_type):
            known = dict.fromkeys(chain(prompts, description.routes, *_PROMPT_SYNONYMS, _OTHER_TASKS))
            raise RequestError(
                f"Invalid value for 'input_type' = {input_type[:100]!r}. Supported values: "
                f"[{', '.join(map(repr, known))}].",
                param="input_type",
            )
        for name in synonyms:
            if name in prompts:
                return prompts[name]
    return prompts.get(default, "") if default is not None else ""


def check_input_types(spec: ModelSpec, description: ModelDescription) -> None:
    """Raise LoadError if an alias of a model has an `input_type` that its requests cannot have."""
    for alias in spec.aliases:
        input_type = spec.defaults_of(alias).input_type
        if input_type is None:
            continue
        try:
            choose_task(input_type, description)
            choose_prompt(input_type, description)
        except RequestError as error:
            names = ", ".join(map(repr, dict.fromkeys((*description.prompts, *description.routes))))
            raise LoadError(
                f"the alias {alias} has input_type {input_type!r} in EMB_PROVIDER_MODEL_MAPPING, which the model does not "
                f"have. Its prompts: {names or 'none'}. Set input_type to one of them, or remove it."
            ) from error


def has_search_prompts(description: ModelDescription) -> bool:
    """Return whether a model has a prompt or a route for queries, and one for documents."""
    names = {*description.prompts, *description.routes}
    return all(names.intersection(synonyms) for synonyms in _PROMPT_SYNONYMS)


def _is_other_task(input_type: str) -> bool:
    return input_type in _OTHER_TASKS or input_type.startswith(_OTHER_TASKS_PREFIX)


def _synonyms(input_type: str) -> tuple[str, ...]:
    return next((names for names in _PROMPT_SYNONYMS if input_type in names), ())


def check_dimensions(requested: int | None, description: ModelDescription, spec: ModelSpec) -> int | None:
    """Return the size to truncate vectors to, or None to keep their size.

    Raises:
        DimensionsError: Neither the model nor the settings allow the size.
    """
    native = description.dimension
    if requested is None or requested == native:
        return None
    allowed = description.matryoshka, spec.dimensions
    if "any" in allowed:
        if 1 <= requested < native:
            return requested
        raise DimensionsError(f"1 to {native}", native)
    sizes = {size for group in allowed if isinstance(group, tuple) for size in group if size < native}
    if requested in sizes:
        return requested
    raise DimensionsError(", ".join(map(str, sorted({*sizes, native}))), native)


def postprocess(vectors: NDArray[np.float32], *, dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """Return float32 vectors of shape (inputs, dimension) truncated and normalized, or unchanged if neither is needed.

    Truncated vectors are always normalized. Zero vectors stay zero.
    """
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    elif not normalize:
        return vectors
    norms = np.maximum(np.sqrt(np.vecdot(vectors, vectors)), _MIN_NORM)
    result: NDArray[np.float32] = vectors / norms[:, np.newaxis]
    return result


def activate(logits: NDArray[np.float32], activation: Activation) -> NDArray[np.float32]:
    """Return the scores of logits of shape (inputs, labels), computed in float64, so that high scores remain distinct."""
    values = logits.astype(np.float64)
    match activation:
        case "sigmoid":
            # Without overflow for large negative logits.
            values = np.exp(-np.logaddexp(0.0, -values))
        case "softmax":
            values = np.exp(values - values.max(axis=1, keepdims=True))
            values /= values.sum(axis=1, keepdims=True)
        case "identity":
            return logits
    return values.astype(np.float32)
