"""The pages: their languages, their headers, what they show, and what their forms do."""

from __future__ import annotations

import asyncio
import hashlib
import html
import json
import re
import shlex
import subprocess
import zipfile
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

import click
import pytest

from emb_model_provider.api.console import page, rendering
from emb_model_provider.api.console.recommended import suggested_models
from emb_model_provider.api.console.texts import LANGUAGES
from emb_model_provider.cli.main import main as cli
from emb_model_provider.management.kept_models import KeptModel, KeptModels
from emb_model_provider.management.types import DownloadRecord
from emb_model_provider.progress import Progress
from emb_model_provider.registry import ModelStatus, State
from emb_model_provider.settings import Settings
from tests.api.console.conftest import REMOTE, Open
from tests.api.helpers import small_repository
from tests.backends.helpers import description
from tests.models import spec_of
from tests.service import BUNDLED, wait_until

if TYPE_CHECKING:
    from emb_model_provider.api.console.texts import Language
    from tests.hubs.servers import HuggingFaceServer
    from tests.service import Service

DIRECTORY = Path(page.__file__).parent
PAGES = [
    "",
    "/models",
    "/models?kind=reranker",
    "/cache",
    "/playground",
    "/playground?mode=search",
    "/batches",
    "/settings",
    "/sign-in",
]
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
VENDORED = {
    "htmx.min.js": "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130",  # npm: htmx.org@4.0.1, dist/htmx.min.js
    "hx-sse.min.js": "18ef2761356ec1fe0bb6d92612315b37517a7c1e9856b661c5ae81fef239d103",  # npm: htmx.org@4.0.1, dist/ext/hx-sse.min.js
}
VOID = {"meta", "link", "input", "img", "br", "hr"}
ENGLISH, CHINESE = (
    json.loads((DIRECTORY / "texts" / f"{language}.json").read_text(encoding="utf-8")) for language in ("en", "zh")
)
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in (DIRECTORY / "templates").iterdir()}
HTMX = {"hx-request": "true"}


class Markup(HTMLParser):
    """Checks that elements are closed in order, and collects attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


# --- languages ----------------------------------------------------------------------------------------


def test_both_languages_have_the_same_texts() -> None:
    """The same keys, with the same values to fill in."""

    def names(text: str) -> set[str | None]:
        return {name for _, name, _, _ in Formatter().parse(text) if name is not None}

    assert list(ENGLISH) == list(CHINESE)
    assert {key: names(text) for key, text in ENGLISH.items()} == {key: names(text) for key, text in CHINESE.items()}
    same = {key for key, text in ENGLISH.items() if text == CHINESE[key]}
    assert same == {"hubs.modelscope", "hubs.huggingface"}, "not translated"


def test_every_text_is_used_and_every_used_text_exists() -> None:
    sources = [*TEMPLATES.values(), *(path.read_text(encoding="utf-8") for path in DIRECTORY.glob("*.py"))]
    text = "\n".join(sources)
    used = set(re.findall(r"""\bt\(["']([\w.]+)["'][,)]""", text))
    used |= set(re.findall(r"""(?:message|self\(f?)=?["']([a-z_]+\.[a-z_]+)["']""", text))
    prefixes = set(re.findall(r"""\bt\(["']([\w.]+\.)["'] ~""", text))
    prefixes |= {f"{name}." for name in re.findall(r"""optional\(["'](\w+)["']""", text)} | {"age."}
    assert used <= ENGLISH.keys(), used - ENGLISH.keys()
    unused = {key for key in ENGLISH if key not in used and not key.startswith(tuple(prefixes))}
    assert not unused


def test_states_and_groups_of_settings_have_texts() -> None:
    assert {f"state.{state}" for state in State} <= ENGLISH.keys()
    titles = {kind.model_config["title"] for kind in Settings.groups().values()}
    assert {f"settings_groups.{title}" for title in titles} <= ENGLISH.keys()


@pytest.mark.parametrize(
    ("query", "cookie", "header", "language"),
    [
        ("", None, None, "en"),
        ("", None, "zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
        ("", None, "de, en;q=0.5, zh;q=0.7", "zh-CN"),
        ("", None, "zh;q=0, fr", "en"),
        ("", None, "zh;q=x,;,,=", "en"),
        ("", "zh", "en", "zh-CN"),
        ("?lang=en", "zh", "zh", "en"),
        ("?lang=xx", None, "zh", "zh-CN"),
        ("?lang=xx", "xx", None, "en"),
    ],
)
async def test_the_language_is_chosen(
    open_console: Open, query: str, cookie: str | None, header: str | None, language: str
) -> None:
    """By the query, then the cookie, then the browser."""
    headers = {"accept-language": header} if header is not None else {}
    if cookie is not None:
        headers["cookie"] = f"emb_provider_language={cookie}"
    async with open_console() as (client, _):
        response = await client.get(f"/console{query}", headers=headers)
    assert f'<html lang="{language}">' in response.text


async def test_the_language_of_the_query_is_kept(open_console: Open) -> None:
    async with open_console() as (client, _):
        response = await client.get("/console/models?lang=zh")
        assert "SameSite=strict" in response.headers["set-cookie"]
        assert "推荐" in response.text
        assert "模型" in (await client.get("/console/cache")).text


# --- every page ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("path", [*PAGES, "/nothing"])
async def test_pages_are_valid_and_self_contained(open_console: Open, path: str, language: str) -> None:
    """Balanced elements, unique ids, no inline script or style, no URL of another host, and the policy that forbids them."""
    async with open_console() as (client, _):
        response = await client.get(f"/console{path}", headers={"accept-language": language})
    assert response.status_code == (404 if path == "/nothing" else 200)
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    markup = Markup(response.text)
    for tag, name, value in markup.attributes:
        assert not name.startswith(("on", "hx-on", "style")), (tag, name)
        if name in ("href", "src", "action") or (name.startswith("hx-") and value.startswith("/")):
            assert value.startswith(("/console", "#", "/docs", "/metrics")), (tag, value)
        assert "js:" not in value
    ids = [value for _, name, value in markup.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert not re.search(r"<style|<script(?! src=)", response.text)


async def test_pages_of_errors_have_the_policy(open_console: Open) -> None:
    async with open_console(REMOTE, admin_api_keys="key") as (client, _):
        wrong = await client.post("/console/sign-in", data={"key": "wrong"})
        assert wrong.headers["content-security-policy"] == POLICY


def test_assets_are_small_and_unchanged() -> None:
    """All together have less than 100 kB, and the vendored ones are those of npm."""
    files = {path.name: path.read_bytes() for path in rendering.STATIC.iterdir()}
    assert sum(map(len, files.values())) < 100_000
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in VENDORED} == VENDORED


async def test_assets_can_be_kept_by_browsers(open_console: Open) -> None:
    """Their URLs change with their content."""
    async with open_console() as (client, _):
        overview = (await client.get("/console")).text
        for url in re.findall(r'(?:src|href)="(/console/static/[^"]+)"', overview):
            response = await client.get(url)
            assert response.status_code == 200
            assert "immutable" in response.headers["cache-control"]
            assert hashlib.sha256(response.content).hexdigest().startswith(url.partition("?v=")[2])


async def test_texts_of_others_are_escaped(open_console: Open) -> None:
    alias = "<script>alert(1)</script>\"'"
    async with open_console(model_mapping={alias: {"name": BUNDLED}}) as (client, _):
        for path in PAGES:
            text = (await client.get(f"/console{path}")).text
            assert "<script>alert" not in text
        failed = await client.post("/console/models/download", data={"model_name": "<img src=x>\x00"}, headers=HTMX)
        assert failed.status_code == 400
        assert "<img" not in failed.text


# --- single pages -------------------------------------------------------------------------------------


async def test_settings_show_origins_and_mask_secrets(tmp_path: Path, open_console: Open) -> None:
    async with open_console(
        hf_token="hush-1", api_keys="hush-2", hf_endpoint="http://user:hush-3@mirror.example/x",
        model_mapping={"mini": {"name": BUNDLED, "token": "hush-4"}},
    ) as (client, _):  # fmt: skip
        await client.post("/console/sign-in", data={"key": "hush-2"})
        text = (await client.get("/console/settings")).text
    assert "hush" not in text
    assert "http://***@mirror.example/x" in text
    for setting in Settings.variables():
        assert f"EMB_PROVIDER_{setting.upper()}<" in text


async def test_the_url_of_commands_is_that_of_the_browser(open_console: Open) -> None:
    cases = [
        ("localhost:9000", {"sec-fetch-site": "none"}, "http://localhost:9000/v1"),
        ("emb.example", {"authorization": "Bearer key"}, "http://emb.example/v1"),
        ("emb.example", {"authorization": "Bearer key", "sec-fetch-site": "none"}, "https://emb.example/v1"),
    ]
    for host, headers, url in cases:
        async with open_console(host=host, admin_api_keys="key", allowed_hosts="*") as (client, _):
            response = await client.get("/console", headers={"authorization": "Bearer key", **headers})
            assert url in response.text


def test_suggested_models_are_complete() -> None:
    """The seeds of users name the badge; all names are ids of repositories, and at least one is small and Chinese."""
    models = suggested_models()
    assert 3 <= sum(model.recommended for model in models) < len(models)
    for model in models:
        assert all(name.count("/") == 1 for name in model.names.values())
    assert models[0].languages["en"] == "Chinese"
    assert {hub for model in models for hub in model.names} == {"huggingface", "modelscope"}


async def test_last_failures_are_shown_without_their_texts(open_console: Open) -> None:
    async with open_console() as (client, _):
        await client.post("/v1/embeddings", json={"model": "no-such-model-or-text", "input": "hello"})
        text = (await client.get("/console")).text
    assert "model_not_found" in text
    assert "no-such-model-or-text" not in text


async def test_without_javascript_forms_lead_back_to_their_page(open_console: Open) -> None:
    async with open_console(offline=True) as (client, _):
        response = await client.post("/console/models/download", data={"model_name": "acme/none", "compile": "true"})
        assert (response.status_code, response.headers["location"]) == (303, "/console/models")
        failed = await client.post("/console/models/download", data={"model_name": ""})
        assert failed.status_code == 400
        assert "model_name" in failed.text
        assert "<h1>" in failed.text


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("/console/models/download", {}, "Missing required parameter"),
        ("/console/models/download", {"model_name": "a/b", "precision": "int5"}, "precision"),
        ("/console/models/cancel", {"job": "x"}, "There is no job"),
        ("/console/models/unload", {"model_name": "x"}, "does not exist"),
        ("/console/models/load", {"model_name": "/etc"}, "a form cannot name. Choose ModelScope or Hugging Face"),
        ("/console/models/download", {"model_name": "/etc"}, "a form cannot name. Choose ModelScope or Hugging Face"),
        ("/console/batches/cancel", {"batch": "x"}, "No batch found"),
        ("/console/cache/remove", {}, "model_name"),
        ("/console/cache/remove", {"model_name": "a/b"}, "not on"),
        ("/console/playground", {"model": "mini", "texts": "one"}, "2 to 16"),
        ("/console/playground", {"model": "mini", "mode": "search", "documents": "one"}, "query"),
    ],
)
async def test_errors_become_notices(open_console: Open, path: str, data: dict[str, str], message: str) -> None:
    """htmx puts them at the top of the page, whatever the request wanted to replace."""
    async with open_console(model_mapping={"mini": {"name": BUNDLED}}) as (client, _):
        response = await client.post(path, data=data, headers=HTMX)
    assert 400 <= response.status_code < 500
    assert response.headers["hx-retarget"] == "#notice"
    assert message in response.text
    Markup(response.text)


def assert_valid_commands(html_text: str) -> list[str]:
    """Check that the command line accepts all commands that a page offers to copy, and return them."""
    texts = re.findall(r'<code id="command-[^>]*>(.*?)</code>', html_text, re.DOTALL)
    commands = [line for text in texts for line in html.unescape(text).splitlines()]
    for line in commands:
        program, name, *arguments = shlex.split(line)
        assert program == "emb-provider"
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, line
        command.make_context(name, arguments)
    return commands


def test_actions_can_be_copied_as_commands(managed: Service, hub: HuggingFaceServer) -> None:
    """All that have a command: pull, load, rm, prune and doctor here, and more in the test below."""
    hub.repos["acme/by-command"] = small_repository(79)
    http = managed.http
    form = {"model_name": "acme/by-command", "source": "huggingface"}
    http.post("/console/models/download", data={**form, "compile": "false"}, headers=HTMX)
    wait_until(lambda: 'class="state done"' in http.get("/console/models/state", headers=HTMX).text)
    models = assert_valid_commands(http.get("/console/models").text)
    assert "emb-provider load acme/by-command --source huggingface" in models
    assert "emb-provider pull BAAI/bge-reranker-v2-m3 --source modelscope" in models
    cache = assert_valid_commands(http.get("/console/cache").text)
    assert any(line.startswith("emb-provider rm acme/by-command --source huggingface --revision ") for line in cache)
    removal = assert_valid_commands(http.get("/console/cache/remove", params=form, headers=HTMX).text)
    assert removal == ["emb-provider rm acme/by-command --source huggingface --yes"]
    assert assert_valid_commands(http.get("/console/settings").text) == ["emb-provider doctor"]
    http.post("/console/cache/remove", data=form, headers=HTMX)


async def test_kept_models_are_shown_and_forgotten_for_good(tmp_path: Path, open_console: Open) -> None:
    """A model that was kept has a badge. After it is forgotten in the console, it is not served after a restart, either."""
    kept = KeptModels(tmp_path / "cache_dir")
    kept.add(KeptModel(alias="small", model_name="acme/small", source="huggingface"))
    async with open_console(model_mapping={"mini": {"name": BUNDLED}}) as (client, _):
        shown = (await client.get("/console/models")).text
        assert shown.count('<span class="badge">Kept</span>') == 1
        assert "emb-provider unload small --forget" in assert_valid_commands(shown)
        assert "emb-provider load mini" in assert_valid_commands(shown)
        forget = {"model_name": "small", "forget": "true"}
        await client.post("/console/models/unload", data=forget, headers=HTMX)
        while "acme/small" in (await client.get("/console/models/state", headers=HTMX)).text or kept.read():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("language", "texts"),
    [
        ("en", ["Served by torch while it is compiled.", "step 3 of 6 · 20 s left", "Keep after restarts"]),
        ("zh", ["编译期间由 torch 提供服务。", "第 3 步，共 6 步 · 剩余 20 s", "重启后保留"]),
    ],
)
def test_a_model_that_torch_serves_shows_the_steps_of_the_compiler(language: Language, texts: list[str]) -> None:
    """On both pages with served models, and in the list of downloads."""
    progress = Progress("compile", "acme/small", step="export", step_number=3, step_count=6, seconds_left=17.0)
    status = ModelStatus(
        spec=spec_of(alias="small"), state=State.READY, preload=False, required=False, created=0, error=None,
        progress=progress, restarts=0, snapshot=None, description=description(is_interim=True, notes=("a note",)),
        waiting_inputs=0, waiting_tokens=0, configured=False,
    )  # fmt: skip
    state = {"statuses": [status], "kept": frozenset(), "is_changing": True}
    shown = rendering.render("_models_state.html", language, jobs=[], **state)
    Markup(shown)
    assert all(text in shown for text in texts)
    assert "a note" not in shown
    values = dict.fromkeys(DownloadRecord.model_fields) | {
        "id": "1", "kind": "download", "state": "running", "model_name": "acme/small", "source": "modelscope", "force": False,
        "compile": True, "phase": "compile", "done_bytes": 0, "cancelling": False, "created": datetime.now(UTC), "notes": [],
        "step_number": 3, "step_count": 6, "seconds_left": 17.0,
    }  # fmt: skip
    jobs = rendering.render(
        "_models_state.html", language, jobs=[DownloadRecord(**values)], **{**state, "statuses": []}
    )
    Markup(jobs)
    assert texts[1] in jobs
    assert '<progress max="6" value="2"' in jobs


async def test_suggestions_are_filtered_by_kind(open_console: Open) -> None:
    async with open_console() as (client, _):
        names = {}
        for kind in ("", "dense", "reranker", "nonsense"):
            text = (await client.get(f"/console/models?kind={kind}")).text
            names[kind] = re.findall(r"<h3>([\w./-]+)", text)
    assert names["reranker"] == ["BAAI/bge-reranker-v2-m3", "BAAI/bge-reranker-base"]
    assert names["dense"] + names["reranker"] == names[""] == names["nonsense"]


@pytest.mark.parametrize(
    "form",
    [
        {"model_name": "acme/none", "source": "huggingface"},
        {"model_name": "iic/none", "source": "modelscope"},
        {"model_name": "no owner", "source": "huggingface"},
        {"model_name": "none", "source": "modelscope"},
    ],
    ids=str,
)
def test_a_download_that_failed_has_advice_for_a_form(managed: Service, form: dict[str, str]) -> None:
    """It does not advise to set the model of the service, which a download does not use."""
    http = managed.http
    started = http.post("/console/models/download", data=form, headers=HTMX)
    text = started.text
    if started.status_code == 200:
        wait_until(lambda: "every 1s" not in http.get("/console/models/state", headers=HTMX).text)
        text = http.get("/console/models/state", headers=HTMX).text
    assert form["model_name"] in html.unescape(text)
    assert "Check the name" in text or "printable" in text
    assert "EMB_PROVIDER_MODEL_NAME" not in text


def test_a_model_is_downloaded_and_removed_by_forms(managed: Service, hub: HuggingFaceServer) -> None:
    hub.repos["acme/by-forms"] = small_repository(77)
    http = managed.http
    form = {"model_name": "acme/by-forms", "source": "huggingface"}
    downloaded = http.post("/console/models/download", data={**form, "compile": "false"}, headers=HTMX)
    assert "acme/by-forms" in downloaded.text
    wait_until(lambda: "every 1s" not in http.get("/console/models/state", headers=HTMX).text)
    assert 'class="state done"' in http.get("/console/models/state", headers=HTMX).text
    shown = http.get("/console/cache").text
    assert "acme/by-forms" in shown
    preview = http.get("/console/cache/remove", params=form, headers=HTMX)
    assert preview.headers["hx-retarget"] == "#notice"
    assert "This frees 200\u00a0kB." in preview.text
    assert "acme/by-forms" in http.get("/console/cache").text
    removed = http.post("/console/cache/remove", data=form, headers=HTMX)
    assert "Removed." in removed.text
    assert "acme/by-forms" not in removed.text


def test_a_download_is_cancelled_and_continued(managed: Service, hub: HuggingFaceServer) -> None:
    hub.repos["acme/paused"] = small_repository(78)
    paused = {"model_name": "acme/paused", "compile": "false"}
    http = managed.http
    with hub.faults.holding("model.safetensors", 1000):
        started = http.post("/console/models/download", data=paused, headers=HTMX).text
        (job,) = re.findall(r'name="job" value="(\w+)"', started)
        http.post("/console/models/cancel", data={"job": job}, headers=HTMX)
    wait_until(lambda: 'class="state cancelled"' in http.get("/console/models/state", headers=HTMX).text)
    http.post("/console/models/download", data=paused, headers=HTMX)
    wait_until(lambda: 'class="state done"' in http.get("/console/models/state", headers=HTMX).text)
    http.post("/console/cache/remove", data={"model_name": "acme/paused"}, headers=HTMX)


def test_the_playground_compares_texts_and_ranks_documents(service: Service) -> None:
    texts = "How do I reset my password?\nI forgot my login.\n\nIt rains."
    compared = service.http.post("/console/playground", data={"model": BUNDLED, "texts": texts}, headers=HTMX).text
    Markup(compared)
    assert compared.count("<rect") == 9
    assert compared.count(">1.00</text>") == 3
    form = {"mode": "search", "model": BUNDLED, "query": "password", "documents": "It rains.\nReset your password."}
    ranked = service.http.post("/console/playground", data=form, headers=HTMX).text
    assert ranked.index("<td>Reset your password.</td>") < ranked.index("<td>It rains.</td>")
    whole = service.http.post("/console/playground", data=form).text
    assert "<h1>" in whole
    assert "<td>It rains.</td>" in whole


@pytest.mark.slow
def test_the_code_of_the_playground_runs(service: Service, tmp_path: Path) -> None:
    """The Python code prints the cosines of the heat map, and curl gets the vectors."""
    import sys

    texts = 'it\'s a "quoted" text\n文本 with $HOME and \\n'
    page_text = service.http.post("/console/playground", data={"model": BUNDLED, "texts": texts}, headers=HTMX).text
    codes = [html.unescape(code) for code in re.findall(r"<code id=\"code-[^>]*>(.*?)</code>", page_text, re.DOTALL)]
    curl, python, javascript = codes
    output = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
    assert len(json.loads(output)["data"]) == 2
    output = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True).stdout
    (cosine,) = set(re.findall(r">(-?0\.\d\d)</text>", page_text))
    assert cosine in output.replace("\n", " ")
    assert "JSON.stringify" in javascript


@pytest.mark.slow
def test_the_wheel_contains_the_console(tmp_path: Path) -> None:
    root = DIRECTORY.parents[2]
    subprocess.run(["uv", "build", "--quiet", "--wheel", "--out-dir", str(tmp_path)], cwd=root, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {
        path.relative_to(root).as_posix()
        for path in DIRECTORY.rglob("*")
        if path.suffix in (".html", ".json", ".js", ".css", ".svg")
    }
    assert len(files) > 20
    assert files <= names
