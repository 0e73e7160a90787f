"""The port, the hubs, and whether what is configured is here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from emb_model_provider.cli.doctor import CheckResult
from emb_model_provider.errors import NotCachedError, ProviderError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.cli.doctor import Level
    from emb_model_provider.hubs.connectivity import HubStatus, RemoteHubName
    from emb_model_provider.management.types import CachedModelRecord
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import Settings

_HUB_S = 10.0
_NAMES = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_PREFIXES = {"huggingface": "EMB_PROVIDER_HF", "modelscope": "EMB_PROVIDER_MODELSCOPE"}


def check_port(settings: Settings) -> Iterator[CheckResult]:
    """Is it free, or is it the service itself that listens there?"""
    from emb_model_provider.cli.server_client import server_url
    from emb_model_provider.main import listen

    server = settings.server
    where = f"{server.host}:{server.port}"
    try:
        sockets = listen(server)
    except SettingsError as error:
        if _is_ours(server_url(server)):
            yield CheckResult("port", "ok", f"{where}, the service is running")
        else:
            yield CheckResult("port", "fail", f"{where} cannot be had", error.message)
        return
    for one in sockets:
        one.close()
    yield CheckResult("port", "ok", f"{where} is free")


def _is_ours(url: str) -> bool:
    import httpx

    try:
        answer = httpx.get(f"{url}/health", timeout=3.0, trust_env=False)
        return bool(answer.json() == {"status": "ok"})
    except (httpx.HTTPError, ValueError):
        return False


def check_hubs(settings: Settings) -> Iterator[CheckResult]:
    """Ask the hubs, side by side, for the models that are configured from them; OFFLINE asks nobody."""
    from emb_model_provider.hubs.connectivity import RemoteHubName, check_hub

    if settings.hubs.offline:
        yield CheckResult("hubs", "ok", "not asked: EMB_PROVIDER_OFFLINE (or HF_HUB_OFFLINE) is set")
        return
    wanted = _wanted(settings)
    hubs: tuple[RemoteHubName, ...] = get_args(RemoteHubName)
    with ThreadPoolExecutor(len(hubs)) as pool:
        reached = pool.map(
            lambda hub: check_hub(
                hub, settings.hubs, repository=next(iter(wanted.get(hub, ())), None), timeout_s=_HUB_S
            ),
            hubs,
        )
        for one in reached:
            yield _judged(one, needed=bool(wanted.get(one.hub)))


def _wanted(settings: Settings) -> dict[str, list[str]]:
    """Return what each hub calls the models that are configured from it and are not here yet."""
    from emb_model_provider.model_resolver import resolve_source

    wanted: dict[str, list[str]] = {}
    for spec in settings.models.specs():
        hub = resolve_source(spec)
        if hub in _NAMES and not any(entry.state == "complete" for entry in _on_disk(settings, spec)):
            wanted.setdefault(hub, []).append(settings.hubs.name_on(hub, spec.name))
    return wanted


def _judged(reached: HubStatus, *, needed: bool) -> CheckResult:
    """Return what a hub's answer means: without it, what is here is served all the same."""
    name, prefix = _NAMES[reached.hub], _PREFIXES[reached.hub]
    worst: Level = "fail" if needed else "warn"
    token = "with a token" if reached.token else "without a token"
    found = f"{reached.endpoint}, {token}"
    if reached.state == "answers":
        return CheckResult(name, "ok", f"{found}: answers")
    if reached.state == "refuses":
        what = "the token is refused" if reached.token else f"{reached.repository} asks for a token"
        advice = f"Set {prefix}_TOKEN to a token that may read {reached.repository}."
        return CheckResult(name, "fail" if reached.token else worst, f"{found}: {what}", advice)
    if reached.state == "lacks":
        if not needed:
            return CheckResult(name, "ok", f"{found}: answers")
        advice = f"Check the model's name and its hub, or set {prefix}_TOKEN if it is private."
        return CheckResult(name, "fail", f"{found}: answers, but has no {reached.repository} for us", advice)
    what = "answers with an error" if reached.state == "fails" else "is out of reach"
    other = (
        "or EMB_PROVIDER_MODEL_SOURCE to the other hub"
        if reached.hub == "huggingface"
        else "or try again later"
    )
    advice = f"Check the network and the proxy; set {prefix}_ENDPOINT to a mirror, {other}."
    if not needed:
        advice += " What is on this disk is served without it (EMB_PROVIDER_OFFLINE=true asks nobody)."
    return CheckResult(name, worst, f"{found}: {what} ({reached.reason})", advice)


def check_models(settings: Settings) -> Iterator[CheckResult]:
    """Is what is configured on the disk, and compiled?"""
    from emb_model_provider.model_resolver import resolve_source

    for spec in settings.models.specs():
        check = f"model {spec.alias}"
        hub = resolve_source(spec)
        pull = f"emb-provider pull {spec.alias}"
        if hub == "local" and not (spec.path or Path(spec.name).expanduser()).is_dir():
            advice = "Check EMB_PROVIDER_MODEL_PATH, or the mapping's path."
            yield CheckResult(check, "fail", f"its directory {spec.path or spec.name} is not there", advice)
            continue
        entries = _on_disk(settings, spec)
        complete = [entry for entry in entries if entry.state == "complete"]
        if complete:
            yield _compiled(check, complete, pull, spec)
        elif entries:
            yield CheckResult(check, "warn", f"{entries[0].state}, from {hub}", f"To mend it: {pull}")
        elif hub in ("local", "bundled"):
            yield CheckResult(
                check, "warn", f"{hub}, not compiled yet", f"The first start will; to do it now: {pull}"
            )
        elif settings.hubs.offline:
            advice = f"Without EMB_PROVIDER_OFFLINE, once: {pull}"
            yield CheckResult(check, "fail", f"not on this machine, and {hub} may not be asked", advice)
        else:
            yield CheckResult(
                check,
                "warn",
                f"not on this machine yet ({hub})",
                f"The first start will fetch it; to do it now: {pull}",
            )


def _compiled(check: str, entries: list[CachedModelRecord], pull: str, spec: ModelSpec) -> CheckResult:
    from emb_model_provider.cli.output import precision_label

    artifacts = [artifact for entry in entries for artifact in entry.artifacts]
    if artifacts:
        labels = dict.fromkeys(precision_label(one.precision, one.computed) for one in artifacts)
        return CheckResult(check, "ok", f"on this disk, compiled at {', '.join(labels)}")
    if spec.backend == "torch" or spec.device.startswith(("cuda", "mps")):
        return CheckResult(check, "ok", "on this disk")
    return CheckResult(
        check, "warn", "on this disk, not compiled yet", f"The first start will; to do it now: {pull}"
    )


def _on_disk(settings: Settings, spec: ModelSpec) -> list[CachedModelRecord]:
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_resolver import resolve_source

    name = str(spec.path.absolute()) if spec.path is not None else spec.name
    try:
        return ModelManager(settings).find(name, source=resolve_source(spec), revision=spec.revision)
    except NotCachedError:
        return []
    except (ProviderError, OSError):
        return []  # of a cache that cannot be read another check tells
