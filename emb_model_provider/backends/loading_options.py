"""What the configuration files of a repository may pass on to the libraries that load it.

sentence-transformers passes objects of `sentence_bert_config.json` to `from_pretrained`, and transformers and PEFT read
further options from their own files. Some of these options read any file of the machine, load kernels from a hub, or run
regular expressions of the repository, which can take forever while they block all threads of the process.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_ATTENTION = frozenset({"eager", "sdpa"})
"""Implementations of attention that are part of torch and transformers. They differ in speed only."""
_NAMES = {"model_args": "model_kwargs", "tokenizer_args": "processor_kwargs", "config_args": "config_kwargs"}
"""Old names of the objects of a Transformer's configuration, which older files have."""
_ALLOWED: Mapping[str, Mapping[str, type]] = {
    "model_kwargs": {"add_pooling_layer": bool},
    "processor_kwargs": {
        "add_bos_token": bool,
        "add_eos_token": bool,
        "add_prefix_space": bool,
        "clean_up_tokenization_spaces": bool,
        "do_lower_case": bool,
        "fix_mistral_regex": bool,
        "model_max_length": int,
        "padding_side": str,
        "strip_accents": bool,
        "truncation_side": str,
        "use_fast": bool,
    },
    "config_kwargs": {
        "is_causal": bool,
        "unpad_inputs": bool,
        "use_bidirectional_attention": bool,
        "use_cache": bool,
        "use_memory_efficient_attention": bool,
    },
}
"""Options that may be passed on, by the object that has them."""
_WITHOUT_EFFECT = frozenset(
    {
        "attn_implementation", "cache_dir", "device", "device_map", "dtype", "force_download", "local_files_only",
        "low_cpu_mem_usage", "resume_download", "revision", "token", "torch_dtype", "trust_remote_code",
        "use_auth_token", "use_safetensors", "weights_only",
    }
)  # fmt: skip
"""Options that the service decides itself. They are omitted."""
_CONFIG_SECTIONS = frozenset(_ALLOWED) | frozenset(_NAMES)
_TOKENIZER_PATHS = re.compile(r".*_files?|init_inputs|name_or_path")
"""Keys of `tokenizer_config.json` with paths on the machine on which the tokenizer was saved."""
_ADAPTER_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
_ADAPTER_MAPS = ("rank_pattern", "alpha_pattern")
"""Values, and objects with keys, of `adapter_config.json` that PEFT matches with the names of modules."""
_ADAPTER_OTHERS = ("megatron_config", "layer_replication")
"""Keys of `adapter_config.json` that import packages or copy layers."""
_MERGE = "Merge the adapter into its base model, and serve the result."
_QUANTIFIERS = frozenset("*+{")
_MAX_QUANTIFIERS = 3
"""Quantifiers of a pattern that is matched with names of about a hundred characters."""


def transformer_options(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a Transformer's configuration with allowed options only.

    Args:
        values: The contents of a `sentence_bert_config.json`, or of a file with another name and the same purpose.
        where: The file, with the name of its repository, for messages.

    Raises:
        UnsupportedModelError: It has an option that could change the vectors and is not allowed, or of the wrong type.
    """
    return {
        key: _section(values[key], _NAMES.get(key, key), f"{key} of {where}")
        if key in _CONFIG_SECTIONS
        else values[key]
        for key in values
    }


def tokenizer_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a `tokenizer_config.json` without paths of files."""
    return {key: value for key, value in values.items() if not _TOKENIZER_PATHS.fullmatch(key)}


def config_options(value: Any) -> Any:
    """Return the contents of a `config.json` without implementations of attention that are not part of the libraries."""
    if isinstance(value, dict):
        return {
            key: config_options(item)
            for key, item in value.items()
            if not key.endswith(("_implementation", "_implementation_internal"))
            or (isinstance(item, str) and item in _ATTENTION)
        }
    return [config_options(item) for item in value] if isinstance(value, list) else value


def require_safe_adapter(values: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedModelError if an `adapter_config.json` has patterns or options that must not be used."""
    for key in _ADAPTER_OTHERS:
        if values.get(key):
            raise UnsupportedModelError(f"{where} sets {key}, which is not supported. {_MERGE}")
    named = [(key, values.get(key)) for key in _ADAPTER_PATTERNS]
    named += [(key, list(value) if isinstance(value := values.get(key), dict) else value) for key in _ADAPTER_MAPS]
    for key, value in named:
        for pattern in value if isinstance(value, list) else [value]:
            if isinstance(pattern, str) and (
                has_nested_quantifiers(pattern) or sum(map(pattern.count, _QUANTIFIERS)) > _MAX_QUANTIFIERS
            ):
                raise UnsupportedModelError(
                    f"{where} has the pattern {pattern[:80]!r} ({key}), which is too complex. {_MERGE}"
                )


def has_nested_quantifiers(pattern: str) -> bool:
    """Return whether a regular expression repeats a group that itself contains a repetition or alternatives.

    The time of a backtracking search can then grow exponentially with the length of the text. Escaped characters and
    classes (`[...]`) are not quantifiers.
    """
    groups = [False]  # whether each open group contains a quantifier or alternatives
    closed = False  # whether the group that has just been closed does
    in_class = escaped = False
    for character in pattern:
        if escaped or in_class:
            in_class = in_class and (escaped or character != "]")
            escaped = in_class and not escaped and character == "\\"
            closed = False
            continue
        if closed and character in _QUANTIFIERS:
            return True
        closed = False
        if character == "\\":
            escaped = True
        elif character == "[":
            in_class = True
        elif character == "(":
            groups.append(False)
        elif character == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif character in _QUANTIFIERS or character == "|":
            groups[-1] = True
    return False


def _section(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{where} is {type(value).__name__}, not an object. Correct the file.")
    allowed = _ALLOWED[name]
    kept: dict[str, Any] = {}
    for key, item in value.items():
        if key in _WITHOUT_EFFECT:
            continue
        if key not in allowed:
            raise UnsupportedModelError(
                f"{where} has the option {key[:80]!r}, which is not passed on to the libraries (allowed: "
                f"{_listed(allowed)}). Save the model without it, and serve that directory."
            )
        if type(item) is not allowed[key]:
            raise UnsupportedModelError(
                f"{where}: {key} must be {allowed[key].__name__}, not {type(item).__name__}. Correct the file."
            )
        kept[key] = item
    return kept


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
