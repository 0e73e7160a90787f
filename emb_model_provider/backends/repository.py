"""The files of a repository as the libraries that load it must see them.

A repository can consist of several snapshots: an adapter and its base model, or a model and the code of another
repository. Imports no runtime.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import LoadError, UnsupportedModelError
from emb_model_provider.formatting import first_line, quote
from emb_model_provider.snapshots.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    best_variant,
    is_adapter,
    is_variant,
    is_weights,
    split_path,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from emb_model_provider.snapshots.snapshot import Snapshot

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_MODULE_FOLDER = re.compile(r"(\d+)_(Pooling|Dense|LayerNorm|Normalize)/config\.json")


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_list_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_object_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


_SIZE = (_is_size, "a positive integer")
_SIZES = (_is_list_of(_is_size), "an array of positive integers")
_TEXT = (_is(str), "a string")
_OBJECT = (_is(dict), "an object")
_EXPECTED: tuple[tuple[re.Pattern[str], Mapping[str, tuple[Callable[[object], bool], str]]], ...] = (
    (
        re.compile(r"config_sentence_transformers\.json"),
        {
            "prompts": (_is_object_of(_is(str, type(None))), "an object of strings"),
            "default_prompt_name": _TEXT,
            "truncate_dim": _SIZE,
            "model_type": _TEXT,
            "matryoshka_dimensions": _SIZES,
            "matryoshka_dims": _SIZES,
        },
    ),
    (
        re.compile(r"(.*/)?config\.json"),
        {
            "architectures": (_is_list_of(_is(str)), "an array of strings"),
            "model_type": _TEXT,
            "id2label": (_is(dict, list), "an object"),
            "matryoshka_dimensions": _SIZES,
            "matryoshka_dims": _SIZES,
            "in_features": _SIZE,
            "out_features": _SIZE,
            "hidden_size": _SIZE,
            "num_hidden_layers": _SIZE,
            "vocab_size": _SIZE,
        },
    ),
    (re.compile(r"configuration\.json"), {"model": (_is(dict, str, list), "an object")}),
    (
        re.compile(r"(.*/)?sentence_[^/]+_config\.json"),
        {"max_seq_length": _SIZE, "do_lower_case": (_is(bool), "true or false")},
    ),
    (
        re.compile(r"(.*/)?router_config\.json"),
        {
            "structure": (_is_object_of(_is_list_of(_is(str))), "an object of arrays of strings"),
            "types": (_is_object_of(_is(str)), "an object of strings"),
            "parameters": _OBJECT,
        },
    ),
    (re.compile(r"adapter_config\.json"), {"task_type": _TEXT, "base_model_name_or_path": _TEXT}),
)
"""What the values of a file must be, which are read here. A value that is null counts as absent."""
_REPLACED_CLASSES = frozenset({"pylate.models.Dense.Dense"})
"""Classes of other packages for which sentence-transformers loads its own."""
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Repository:
    """The files of a model, by their paths in the repository."""

    name: str
    """The id of the repository, for messages."""
    files: Mapping[str, Path]
    """Path in the repository, with forward slashes, to the path on disk."""
    adapter: Mapping[str, Path] = field(default_factory=dict)
    """Configuration and weights of a LoRA adapter, by their names; empty if the model is complete."""
    base: str | None = None
    """The base model of the adapter."""
    route: str | None = None
    """The route of a Router whose modules are loaded."""
    code: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    """Python files of other repositories, by the id of the repository as it is referred to, and their paths in it."""

    @classmethod
    def of(cls, snapshot: Snapshot, route: str | None = None) -> Repository:
        """Return the repository of a snapshot and its dependencies, or of a route of its Router.

        Raises:
            UnsupportedModelError: It is an adapter whose base model is not known or not here, or it is unclear whether it
                is one.
        """
        files = {file.path: snapshot.path / file.path for file in snapshot.files}
        base: Repository | None = None
        with_adapter = is_adapter(files)
        adapter = {name: files.pop(name) for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) if name in files}
        if with_adapter:
            base = _base_of(snapshot, adapter[ADAPTER_CONFIG])
            files = {**base.files, **files}
        elif len(adapter) > 1:
            raise UnsupportedModelError(
                f"{snapshot.repository} contains both a complete model and an adapter ({', '.join(adapter)}), and does not "
                "say whether the adapter is merged into the weights. Serve a directory with one of them."
            )
        else:
            adapter = {}
        code = {
            each.required_as: {file.path: each.path / file.path for file in each.files if file.path.endswith(".py")}
            for each in snapshot.dependencies
        }
        return cls(
            name=snapshot.repository,
            files=_rename_variants(files),
            adapter=adapter,
            base=base.name if base is not None else None,
            route=route,
            code={**(base.code if base is not None else {}), **{name: each for name, each in code.items() if each}},
        )

    def read(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file, or an empty one if the file does not exist; LoadError if it is invalid."""
        path = self.files.get(name)
        return self._checked(name, read_object(path)) if path is not None else {}

    def _checked(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file; LoadError if a value has another type than the libraries expect."""
        for pattern, expected in _EXPECTED:
            for key, (check, what) in expected.items() if pattern.fullmatch(name) else ():
                if values.get(key) is not None and not check(values[key]):
                    raise LoadError(
                        f"{name} of {self.name}: {key} must be {what}, not {quote(values[key])}. Correct the file, or choose "
                        "another model."
                    )
        return values

    @cached_property
    def first_module(self) -> dict[str, Any]:
        """The entry of the first module, of the route if there is a Router; empty if no modules are declared."""
        return self.route_modules[0] if self.modules else {}

    @property
    def route_modules(self) -> list[dict[str, Any]]:
        """The entries of the modules that run one after the other: those of the route in the place of a Router."""
        found: list[dict[str, Any]] = []
        for module in self.modules:
            if self.route is None or not is_router(module):
                found.append(module)
                continue
            router = self.router_config(module)
            path = module.get("path") or ""
            found += [
                {"path": f"{path}/{name}", "type": router["types"][name]} for name in router["structure"][self.route]
            ]
        return found

    @property
    def folder(self) -> str:
        """The folder of the first module, with a slash, or an empty string. It has the tokenizer."""
        path = str(self.first_module.get("path") or "").strip("./")
        return f"{path}/" if path else ""

    @property
    def is_static(self) -> bool:
        """Whether the model looks up token vectors and has no transformer."""
        return str(self.first_module.get("type", "")).endswith(".StaticEmbedding")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the transformer, which some models keep in the folder of their first module."""
        return self.read(f"{self.folder}config.json") or self.read("config.json")

    @property
    def stores_bf16(self) -> bool:
        """Whether the model was saved at bf16, so that its values may exceed the range of fp16."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype")).endswith("bfloat16")

    @cached_property
    def nested_modules(self) -> list[dict[str, Any]]:
        """The entries of all modules, with those inside a Router in its place, and their paths without `./`."""
        found: list[dict[str, Any]] = []
        for module in self.modules:
            path = str(module.get("path") or "").strip("./")
            if not is_router(module):
                found.append({**module, "path": path})
                continue
            for name, kind in (self.router_config(module).get("types") or {}).items():
                found.append({"path": f"{path}/{name}" if path else name, "type": kind})
        return found

    def router_config(self, module: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of a Router; LoadError if it has none."""
        path = str(module.get("path") or "").strip("./")
        names = [f"{path}/{name}" if path else name for name in ("router_config.json", "config.json")]
        for name in names:
            config = self.read(name)
            if structure := config.get("structure"):
                types = config.get("types") or {}
                if not all(route and all(each in types for each in route) for route in structure.values()):
                    raise LoadError(
                        f"{name} of {self.name}: each route needs modules, and each module a type. Correct the file."
                    )
                return config
        raise LoadError(f"{self.name} has a Router, but no {names[0]}. Download the model again.")

    @cached_property
    def has_modules(self) -> bool:
        """Whether the repository declares its modules, in `modules.json` or by their folders."""
        return bool(self.modules) or "modules.json" in self.files

    @cached_property
    def modules(self) -> list[dict[str, Any]]:
        """The entries of `modules.json` or, without one, those of the folders of modules, such as `1_Pooling`."""
        if (path := self.files.get("modules.json")) is not None:
            return read_modules(path)
        if self.read("config.json").get("model_type") == "model2vec":
            kinds = ["StaticEmbedding", *(["Normalize"] if self.read("config.json").get("normalize") else [])]
            return [_module(index, kind, "" if index == 0 else f"{index}_{kind}") for index, kind in enumerate(kinds)]
        found = sorted(
            (int(match[1]), match[2], name.rpartition("/")[0])
            for name in self.files
            if (match := _MODULE_FOLDER.fullmatch(name)) is not None
        )
        if not any(kind == "Pooling" for _, kind, _ in found):
            return []
        return [
            _module(0, "Transformer", ""),
            *(_module(index, kind, path) for index, (_, kind, path) in enumerate(found, 1)),
        ]

    @cached_property
    def card(self) -> str:
        """The metadata at the beginning of `README.md`, as text; empty if there is none."""
        path = self.files.get("README.md")
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path is not None else ""
        except OSError:
            return ""
        match = _FRONT_MATTER.search(text)
        return match[1] if match is not None else ""

    def code_references(self) -> Iterator[tuple[str, str]]:
        """Yield every reference to a class in Python files of a repository, with the file that has it."""
        for name in ("config.json", "tokenizer_config.json"):
            auto_map = self.read(name).get("auto_map")
            values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
            for value in values:
                for reference in value if isinstance(value, list) else [value]:
                    if isinstance(reference, str):
                        yield name, reference
        for module in self.nested_modules:
            reference = str(module.get("type", ""))
            if not reference.startswith("sentence_transformers.") and reference not in _REPLACED_CLASSES:
                yield "modules.json", reference

    @property
    def has_processor(self) -> bool:
        """Whether the model also reads images or audio, so that the libraries would load more than a tokenizer."""
        return any(name in self.files for name in _PROCESSOR_FILES) or any(
            f"{kind}_config" in self.config for kind in ("vision", "audio")
        )


@contextmanager
def reading_files(name: str) -> Iterator[None]:
    """Turn errors of code that expects other values in the configuration files of a model into a LoadError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, SyntaxError, RecursionError, MemoryError) as error:
        raise LoadError(
            f"A configuration file of {name} has a value that is not supported ({first_line(error)}). Correct the file, or "
            "choose another model."
        ) from error


def is_router(module: Mapping[str, Any]) -> bool:
    """Return whether an entry of a `modules.json` sends queries and documents through different modules."""
    return str(module.get("type", "")).endswith((".Router", ".Asym"))


def _module(index: int, kind: str, path: str) -> dict[str, Any]:
    """Return an entry of a `modules.json`."""
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}


def is_processor_file(name: str) -> bool:
    """Return whether a file configures the preparation of images, audio or video."""
    return name.rpartition("/")[2] in _PROCESSOR_FILES


def read_modules(path: Path) -> list[dict[str, Any]]:
    """Read a `modules.json`; LoadError if it is invalid."""
    value = _read_json(path)
    if not isinstance(value, list) or not all(isinstance(module, dict) for module in value):
        raise LoadError(f"{path} is not a list of modules. Download the model again, or correct the file.")
    for key in ("path", "type"):
        wrong = next((module[key] for module in value if not isinstance(module.get(key, ""), str | None)), None)
        if wrong is not None:
            raise LoadError(f"{path}: the {key} of a module must be a string, not {quote(wrong)}. Correct the file.")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; LoadError if it is invalid."""
    value = _read_json(path)
    if not isinstance(value, dict):
        raise LoadError(f"{path} is not a JSON object. Download the model again, or correct the file.")
    return value


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(
            f"{path} cannot be read as JSON ({error}). Download the model again, or correct the file."
        ) from error


def _base_of(snapshot: Snapshot, config: Path) -> Repository:
    values = read_object(config)
    name = values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UnsupportedModelError(
            f"{snapshot.repository} is an adapter, and its {ADAPTER_CONFIG} does not name the base model "
            "(base_model_name_or_path). Merge the adapter into its base model, and serve the result."
        )
    dependency = snapshot.dependency(name)
    if dependency is None:
        raise UnsupportedModelError(
            f"{snapshot.repository} is an adapter for {name!r}, which was not downloaded with it. Download it again "
            f"(`emb-provider pull {snapshot.repository} --force`), or merge the adapter into its base model."
        )
    return Repository.of(dependency)


def _rename_variants(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return files with weights at another precision under the plain name, if there are no plain weights."""
    renamed = {name: path for name, path in files.items() if not is_variant(split_path(name)[1])}
    plain = {split_path(name)[0] for name in renamed if is_weights(name)}
    for folder in {split_path(name)[0] for name in files} - plain:
        best = best_variant(name for parent, name in map(split_path, files) if parent == folder)
        if best is not None:
            stem, _, suffix = best.split(".")
            renamed[f"{folder}{stem}.{suffix}"] = files[f"{folder}{best}"]
    return renamed
