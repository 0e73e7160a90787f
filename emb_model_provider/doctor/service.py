"""Checks of what the service needs: the hubs, and the configured models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.doctor import CheckResult
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import precision_label

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.doctor import Level
    from emb_model_provider.hubs.base import HubStatus
    from emb_model_provider.management.types import CachedModelRecord
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import Settings
    from emb_model_provider.settings.fields import RemoteHubName

_HUB_TIMEOUT_S = 10.0
_NAMES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_PREFIXES = {"huggingface": "EMB_PROVIDER_HF", "modelscope": "EMB_PROVIDER_MODELSCOPE"}


def check_hubs(settings: Settings) -> Iterator[CheckResult]:
    """Check that the hubs answer, and that they have the configured models. With OFFLINE no request is sent."""
    from emb_model_provider.hubs.base import check_hub

    if settings.hubs.offline:
        yield CheckResult("hubs", "ok", "not checked: EMB_PROVIDER_OFFLINE (or HF_HUB_OFFLINE) is set")
        return
    missing = _missing_models(settings)
    hubs: tuple[RemoteHubName, ...] = ("huggingface", "modelscope")

    def check(hub: RemoteHubName) -> HubStatus:
        return check_hub(hub, settings.hubs, repository=missing.get(hub), timeout_s=_HUB_TIMEOUT_S)

    with ThreadPoolExecutor(len(hubs)) as pool:
        for status in pool.map(check, hubs):
            yield _judge(status, is_needed=status.hub in missing)


def check_models(settings: Settings) -> Iterator[CheckResult]:
    """Check that the configured models are on disk and compiled."""
    from emb_model_provider.model_resolver import resolve_source

    for spec in settings.models.specs():
        check = f"model {spec.alias}"
        hub = resolve_source(spec)
        pull = f"emb-provider pull {spec.alias}"
        if hub == "local" and not (spec.path or Path(spec.name).expanduser()).is_dir():
            advice = "Check EMB_PROVIDER_MODEL_PATH, or the path in EMB_PROVIDER_MODEL_MAPPING."
            yield CheckResult(check, "fail", f"the directory {spec.path or spec.name} does not exist", advice)
            continue
        models = _on_disk(settings, spec)
        complete = [model for model in models if model.state == "complete"]
        if complete:
            yield _check_compiled(check, complete, pull, spec)
        elif models:
            yield CheckResult(check, "warn", f"{models[0].state}, from {hub}", f"To repair it: {pull}")
        elif hub in ("local", "bundled"):
            yield _not_compiled(check, hub, pull)
        elif settings.hubs.offline:
            advice = f"Unset EMB_PROVIDER_OFFLINE, and run once: {pull}"
            yield CheckResult(check, "fail", f"not on disk, and EMB_PROVIDER_OFFLINE forbids requests to {hub}", advice)
        else:
            advice = f"The first start downloads it. To download it now: {pull}"
            yield CheckResult(check, "warn", f"not on disk yet ({hub})", advice)


def _missing_models(settings: Settings) -> dict[str, str]:
    """Return, for each hub, the first repository that is configured and not on disk yet."""
    from emb_model_provider.model_resolver import resolve_source

    missing: dict[str, str] = {}
    for spec in settings.models.specs():
        hub = resolve_source(spec)
        if hub in _NAMES and not any(model.state == "complete" for model in _on_disk(settings, spec)):
            missing.setdefault(hub, settings.hubs.name_on(hub, spec.name))
    return missing


def _judge(status: HubStatus, *, is_needed: bool) -> CheckResult:
    """Return the result for a hub. Without a hub that is not needed, models on disk are still served."""
    name, prefix = _NAMES[status.hub], _PREFIXES[status.hub]
    level: Level = "fail" if is_needed else "warn"
    found = f"{status.endpoint}, {'with' if status.token else 'without'} a token"
    if status.state == "answers" or (status.state == "lacks" and not is_needed):
        return CheckResult(name, "ok", f"{found}: answers")
    if status.state == "refuses":
        reason = "the token is rejected" if status.token else f"{status.repository} requires a token"
        advice = f"Set {prefix}_TOKEN to a token that can read {status.repository}."
        return CheckResult(name, "fail" if status.token else level, f"{found}: {reason}", advice)
    if status.state == "lacks":
        advice = f"Check the name and the hub of the model, or set {prefix}_TOKEN if it is private."
        return CheckResult(
            name, "fail", f"{found}: answers, but has no readable repository {status.repository}", advice
        )
    failure = "answers with an error" if status.state == "fails" else "cannot be reached"
    alternative = (
        "or EMB_PROVIDER_MODEL_SOURCE to the other hub" if status.hub == "huggingface" else "or try again later"
    )
    advice = f"Check the network and the proxy; set {prefix}_ENDPOINT to a mirror, {alternative}."
    if not is_needed:
        advice += " Models on disk are served without it (EMB_PROVIDER_OFFLINE=true sends no requests to hubs)."
    return CheckResult(name, level, f"{found}: {failure} ({status.reason})", advice)


def _check_compiled(check: str, models: list[CachedModelRecord], pull: str, spec: ModelSpec) -> CheckResult:
    artifacts = [artifact for model in models for artifact in model.artifacts]
    if artifacts:
        labels = dict.fromkeys(precision_label(artifact.precision, artifact.computed) for artifact in artifacts)
        return CheckResult(check, "ok", f"on disk, compiled at {', '.join(labels)}")
    if spec.backend == "torch" or spec.device.startswith(("cuda", "mps")):
        return CheckResult(check, "ok", "on disk")
    return _not_compiled(check, "on disk", pull)


def _not_compiled(check: str, place: str, pull: str) -> CheckResult:
    advice = f"The first start compiles it. To compile it now: {pull}"
    return CheckResult(check, "warn", f"{place}, not compiled yet", advice)


def _on_disk(settings: Settings, spec: ModelSpec) -> list[CachedModelRecord]:
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_resolver import resolve_source

    name = str(spec.path.absolute()) if spec.path is not None else spec.name
    try:
        return ModelManager(settings).find(name, source=resolve_source(spec), revision=spec.revision)
    except (ProviderError, OSError):
        return []  # none, or the cache cannot be read, which another check reports
