"""ModelScope's own `configuration.json`, in the shapes that its sentence-embedding repositories give it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from emb_model_provider.model_spec import Pooling

MODELSCOPE_MAX_LENGTH = 512
"""ModelScope's sentence-embedding pipelines read no more tokens than this, whatever the model could."""

MODELSCOPE_POOLING: dict[str, Pooling] = {
    "cls": "cls",
    "avg": "mean",
    "mean": "mean",
    "weighted_mean": "weightedmean",
    "last": "lasttoken",
}
"""`model.emb_pooler_type` to the pooling it means. ModelScope's avg_top2 and avg_first_last mix several layers."""


def modelscope_model_section(configuration: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the `model` section of a ModelScope sentence-embedding `configuration.json`, else None."""
    model = configuration.get("model")
    section: Mapping[str, Any] = model if isinstance(model, dict) else {}
    named = (configuration.get("task"), configuration.get("tasks"), section.get("task"), section.get("tasks"))
    spelled = {name for task in named for name in _task_names(task)}
    if not spelled:
        spelled = set(_task_names(configuration.get("pipeline")))
    if not spelled and "emb_pooler_type" in section:
        return section
    return section if "sentence-embedding" in spelled else None


def _task_names(task: object) -> Iterator[str]:
    """Yield the names in a task, which is a string, a list, or an object with a name or a type."""
    if isinstance(task, str):
        yield task.strip().lower().replace("_", "-")
    elif isinstance(task, list):
        for item in task:
            yield from _task_names(item)
    elif isinstance(task, dict):
        for key in ("name", "type", "task"):
            yield from _task_names(task.get(key))
