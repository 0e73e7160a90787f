"""Asymmetric models: a Router module has one sequence of modules, a route, for queries and another one for documents.

Each route is loaded as a model of its own, with its own tokenizer, and perhaps its own backend. `RoutedBackend` makes them
one model, whose inputs name the route that they take.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from emb_model_provider.backends.base import Outputs
from emb_model_provider.backends.repository import is_router, reading_files
from emb_model_provider.errors import LoadError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from emb_model_provider.backends.base import Backend, BackendKind, ModelDescription, Row, TokenBatch
    from emb_model_provider.backends.repository import Repository

TASKS = ("query", "document")
"""Tasks of `encode_query` and `encode_document` of sentence-transformers."""

_MODALITY = "text"


@dataclass(frozen=True, slots=True)
class Routes:
    """The routes for text of a repository."""

    by_task: Mapping[str, str]
    """The name of the route of each task; a route without a task is its own task."""
    default: str | None
    """The task of requests that name none. None: they must name one."""


def routes_of(repository: Repository) -> Routes | None:
    """Return the routes that the Router of a repository declares, or None if it has no Router.

    Raises:
        UnsupportedModelError: It has several Routers.
        LoadError: Its configuration has a value of another type than expected.
    """
    with reading_files(repository.name):
        return _routes_of(repository)


def _routes_of(repository: Repository) -> Routes | None:
    routers = [module for module in repository.modules if is_router(module)]
    if not routers:
        return None
    if len(routers) > 1:
        raise UnsupportedModelError(f"{repository.name} has {len(routers)} Routers in a row, which is not supported.")
    config = repository.router_config(routers[0])
    names = tuple(config["structure"])
    parameters = config.get("parameters") or {}
    mappings = {ast.literal_eval(key): route for key, route in (parameters.get("route_mappings") or {}).items()}
    by_task = {task: route for task in TASKS if (route := _resolve(task, names, mappings)) is not None}
    if not mappings:
        by_task |= {name: name for name in names if name not in by_task}
    default = _resolve(None, names, mappings) or parameters.get("default_route")
    if default is None and parameters.get("allow_empty_key", True):
        default = names[0]
    task = next((task for task, route in by_task.items() if route == default), None)
    return Routes(by_task, task)


def _resolve(task: str | None, names: Sequence[str], mappings: Mapping[Any, str]) -> str | None:
    """Return the route of a task like sentence-transformers, or None if there is none."""
    for key in ((task, _MODALITY), (task, None), (None, _MODALITY), (None, None)):
        if key in mappings:
            return mappings[key]
    if task in names:
        return task
    return _MODALITY if _MODALITY in names else None


class RoutedBackend:
    """The backends of all routes of a model, as one backend."""

    def __init__(self, backends: Mapping[str, Backend], routes: Routes) -> None:
        """Combine the backends of routes, by the names of the routes.

        Raises:
            LoadError: Their vectors have different sizes.
        """
        self._backends = dict(backends)
        self._routes = routes
        self.streams = min(backend.streams for backend in backends.values())
        self.memory_bytes = sum(backend.memory_bytes for backend in backends.values())
        self.description = describe_routes({name: each.description for name, each in backends.items()}, routes)

    @classmethod
    def load(cls, loads: Mapping[str, Callable[[], Backend]], routes: Routes) -> RoutedBackend:
        """Load the backend of each route. If one cannot be loaded, those before it are closed."""
        backends: dict[str, Backend] = {}
        try:
            for name, load in loads.items():
                backends[name] = load()
            return cls(backends, routes)
        except BaseException:
            for backend in backends.values():
                backend.close()
            raise

    def run(self, batch: TokenBatch) -> Outputs:
        return self._run(batch, lambda backend, part: backend.run(part))

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        """Compute at fp32; NotImplementedError if a route of the batch has integer weights."""
        return self._run(batch, lambda backend, part: backend.run_fp32(part))

    def close(self) -> None:
        for backend in self._backends.values():
            backend.close()

    def _run(self, batch: TokenBatch, run: Callable[[Backend, TokenBatch], Outputs]) -> Outputs:
        default = self._routes.default or next(iter(self._routes.by_task))
        tasks = batch.tasks or [default] * len(batch.ids)
        names = [self._routes.by_task[task or default] for task in tasks]
        outputs = batch.outputs or self.description.outputs
        results: dict[int, tuple[Row, ...]] = {}
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            part = run(self._backends[name], batch.select(rows))
            results |= {row: part.row(place, outputs) for place, row in enumerate(rows)}
        return Outputs.of_rows(outputs, [results[row] for row in range(len(names))])


def describe_routes(descriptions: Mapping[str, ModelDescription], routes: Routes) -> ModelDescription:
    """Return the description of a model with routes, from those of its routes by their names.

    Raises:
        LoadError: Their vectors have different sizes.
    """
    sizes = {description.dimension for description in descriptions.values()}
    if len(sizes) > 1:
        raise LoadError(
            f"The routes of this model return vectors of different sizes ({', '.join(map(str, sorted(sizes)))})."
        )
    by_task = {task: descriptions[name] for task, name in routes.by_task.items()}
    default = by_task[routes.default] if routes.default is not None else next(iter(by_task.values()))
    lowest = min(
        (each for each in descriptions.values() if each.fidelity is not None),
        key=lambda each: min(each.fidelity.agreement.values(), default=1.0) if each.fidelity is not None else 1.0,
        default=default,
    )
    notes = {note: None for task, each in by_task.items() for note in (f"{task}: {note}" for note in each.notes)}
    return replace(
        default,
        routes=by_task,
        default_route=routes.default,
        notes=tuple(notes),
        fidelity=lowest.fidelity,
        backend=combine_kinds(each.backend for each in descriptions.values()),
        packs=all(each.packs for each in descriptions.values()),
        max_batch_tokens=min(
            (each.max_batch_tokens for each in by_task.values() if each.max_batch_tokens), default=None
        ),
    )


def combine_kinds(kinds: Iterable[BackendKind]) -> BackendKind:
    """Return the backend of a model whose routes have these ones: the one that takes the most memory."""
    return max(kinds, key=("numpy", "openvino", "torch").index)
