"""The console in a real browser: accessibility, foreign requests, and the way from a download to a removal by clicks."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.api.helpers import read_files
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import FAMILIES
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="chromium is not installed (apt-get install chromium)"),
]

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
LONG_MS = 240_000
"""Reached only if something is wrong, even on a slow machine."""
MAX_KEYSTROKES = 40
WORDS: dict[str, dict[str, str]] = {
    "en": {"download": "Download", "load": "Load", "remove": "Remove", "compute": "Compute", "models": "Models",
           "cache": "Cache", "playground": "Playground", "badge": "Recommended"},
    "zh": {"download": "下载", "load": "加载", "remove": "删除", "compute": "计算", "models": "模型", "cache": "缓存",
           "playground": "试用", "badge": "推荐"},
}  # fmt: skip
LOCALES = {"en": "en-US", "zh": "zh-CN"}
SUGGESTED = "BAAI/bge-small-zh-v1.5"
TYPED = "BAAI/bge-m3"


class Visit:
    """A page of a browser, and everything that must not happen in it."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.problems: list[str] = []
        self.keystrokes = 0
        page.set_default_timeout(LONG_MS)
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._check(request.url))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(text)

    def _check(self, url: str) -> None:
        if not url.startswith((f"{self.origin}/", "data:")):
            self.problems.append(f"a foreign request: {url}")

    def open(self, path: str) -> None:
        self.page.goto(f"{self.origin}/console{path}", wait_until="load")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
            self.keystrokes += 1


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HuggingFaceServer, ModelScopeServer]]:
    """Yield both hubs on this machine, each with a small model."""
    files = read_files(FAMILIES["bert-mean-normalize"](tmp_path_factory.mktemp("small") / "model"))
    with HuggingFaceServer({TYPED: files}) as huggingface, ModelScopeServer({SUGGESTED: files}) as modelscope:
        yield huggingface, modelscope


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, service_cache: str, hubs: tuple[HuggingFaceServer, ModelScopeServer]
) -> Iterator[Service]:
    """Yield a service with one loaded model, a model that failed to load, and both hubs on this machine."""
    directory = tmp_path_factory.mktemp("console")
    # A cache of its own, because the pages show all models of a cache; but nothing need be compiled again.
    with suppress(FileNotFoundError):
        ignored = shutil.ignore_patterns(".*", "*.lock", "*.hold")
        shutil.copytree(Path(service_cache, "artifacts"), directory / "cache" / "artifacts", ignore=ignored)
    settings = {
        "CACHE_DIR": str(directory / "cache"),
        "MODEL_MAPPING": json.dumps({"mini": {"name": BUNDLED}, "broken": {"path": str(directory / "not-there")}}),
        "HF_ENDPOINT": hubs[0].url,
        "HF_CACHE_DIR": str(directory / "hf"),
        "MODELSCOPE_ENDPOINT": hubs[1].url,
        "MODELSCOPE_CACHE_DIR": str(directory / "ms"),
    }
    with Service(directory, **settings) as service:
        service.wait_for_state("mini", "ready").wait_for_state("broken", "failed")
        service.embed("hello", model="mini")
        service.embed("hello", model="unknown")
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def visit(request: pytest.FixtureRequest, browser: Browser, served: Service) -> Iterator[Visit]:
    """Yield a visit in a language and a theme, during which nothing must go wrong."""
    values: dict[str, Any] = getattr(request, "param", {})
    context = browser.new_context(
        locale=LOCALES[values.get("language", "en")],
        color_scheme=values.get("theme", "light"),
        viewport={"width": values.get("width", 1280), "height": 900},
    )
    visited = Visit(context.new_page(), served.url)
    yield visited
    context.close()
    assert visited.problems == []


@pytest.mark.parametrize(
    "visit",
    [
        pytest.param({"language": language, "theme": theme, "width": width}, id=f"{language}-{theme}-{width}")
        for language, theme, width in [
            ("en", "light", 1280),
            ("en", "dark", 390),
            ("zh", "dark", 1280),
            ("zh", "light", 390),
        ]
    ],
    indirect=True,
)
def test_no_page_has_barriers(visit: Visit, served: Service) -> None:
    """axe finds no violation, no page is wider than a narrow screen, and the live part keeps running."""
    from axe_playwright_python.sync_playwright import Axe

    file = served.http.post("/v1/files", files={"file": b"hello\n"}, data={"purpose": "batch"}).json()
    batch = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    assert served.http.post("/v1/batches", json=batch).status_code == 200  # so that the page of batches has a table
    for path in PAGES:
        visit.open(path)
        if path.startswith("/playground"):
            visit.page.click("form.stack button")
            visit.page.wait_for_selector("#results section")
        if path == "/cache":
            visit.page.click("td form[action='/console/cache/remove'] button")
            visit.page.wait_for_selector(".confirm")
        for details in visit.page.query_selector_all("details:not([open]) > summary"):
            details.click()
        if not path:
            visit.page.wait_for_timeout(2500)
            assert visit.page.query_selector("#live details[open]") is not None, "an update closed a table"
        violations = Axe().run(visit.page).response["violations"]
        assert [(path, each["id"], each["nodes"][0]["html"]) for each in violations] == []
        widths = visit.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert widths[0] <= widths[1], path


def test_the_overview_updates_itself(visit: Visit, served: Service) -> None:
    visit.open("")
    visit.page.wait_for_selector("#live")
    before = visit.page.inner_text("#live dl")
    for _ in range(30):
        served.embed("hello", model="mini")
    visit.page.wait_for_function("before => document.querySelector('#live dl').innerText !== before", arg=before)


@pytest.mark.parametrize("visit", [{"language": language} for language in WORDS], ids=str, indirect=True)
def test_a_model_is_downloaded_answers_and_is_removed_by_clicks(
    visit: Visit, served: Service, request: pytest.FixtureRequest
) -> None:
    """The steps of the guide that users have: Models, the badge, Download; then it answers; Cache, remove."""
    language = request.node.callspec.params["visit"]["language"]
    words, page = WORDS[language], visit.page
    visit.open("")
    page.get_by_role("link", name=words["models"], exact=True).click()
    card = page.locator(".cards li", has=page.get_by_role("heading", name=SUGGESTED))
    assert words["badge"] in card.inner_text()
    card.get_by_role("button", name=f"{words['download']} ModelScope").click()
    job = page.locator(".jobs li", has_text=SUGGESTED)
    job.locator(".state.done").wait_for()
    job.get_by_role("button", name=words["load"]).click()
    page.locator("tr", has_text=SUGGESTED).locator(".state.ready").wait_for()

    page.get_by_role("link", name=words["playground"], exact=True).click()
    page.locator("select[name=model]").select_option(SUGGESTED)
    page.get_by_role("button", name=words["compute"]).click()
    page.get_by_role("heading", name=SUGGESTED).wait_for()
    assert page.locator("svg.heat rect").count() == 16
    assert served.embed("hello", model=SUGGESTED).status_code == 200

    page.get_by_role("link", name=words["cache"], exact=True).click()
    page.locator("tr", has_text=SUGGESTED).get_by_role("button", name=words["remove"]).click()
    page.locator(".confirm").get_by_role("button", name=words["remove"]).click()
    page.locator(".alert.done").wait_for()
    assert page.locator("tr", has_text=SUGGESTED).count() == 0
    assert served.http.get(f"/api/models/cache/{SUGGESTED}").status_code == 404


def test_a_new_model_is_served_after_few_keystrokes(visit: Visit, served: Service) -> None:
    """From nothing to a model that answers, with the keyboard alone. The address counts with the usual port."""
    page = visit.page
    visit.open("")
    visit.keystrokes = len("localhost:9000/console") + len(["Enter"])
    while page.evaluate("document.activeElement.textContent") != "Models":
        visit.press("Tab")
    visit.press("Enter")
    page.wait_for_url("**/models")
    assert page.evaluate("document.activeElement.name") == "model_name"
    visit.press(*TYPED, "Enter")
    page.locator(".jobs li", has_text=TYPED).locator(".state.done").wait_for()
    # It is on disk, and thus served on demand.
    assert served.embed("hello", model=TYPED).status_code == 200
    assert visit.keystrokes <= MAX_KEYSTROKES


class PrefixProxy(ThreadingHTTPServer):
    """A proxy that publishes a service below a prefix, which it removes from the paths of requests."""

    PREFIX = "/tools/emb"

    def __init__(self, service: Service) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.removeprefix(PrefixProxy.PREFIX)
                if path == self.path:
                    self.send_error(404)
                    return
                answer = httpx.get(f"{service.url}{path}", headers={"accept-encoding": "identity"}, trust_env=False)
                self.send_response(answer.status_code)
                for name in ("content-type", "content-length"):
                    self.send_header(name, answer.headers[name])
                self.end_headers()
                self.wfile.write(answer.content)

            def log_message(self, *args: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://localhost:{self.server_port}{self.PREFIX}"


def test_documentation_sends_requests_behind_a_prefix(browser: Browser, served: Service) -> None:
    """By a click on "Try it out", although the proxy tells the service nothing about the prefix."""
    with PrefixProxy(served) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        page = browser.new_page()
        page.set_default_timeout(LONG_MS)
        page.goto(f"{proxy.url}/docs")
        operation = page.locator(".opblock", has_text="/health")
        operation.locator(".opblock-summary-control").click()
        operation.get_by_role("button", name="Try it out").click()
        with page.expect_response(f"{proxy.url}/health") as answer:
            operation.get_by_role("button", name="Execute").click()
        assert (answer.value.status, answer.value.json()) == (200, {"status": "ok"})
        page.close()
        proxy.shutdown()


def test_without_javascript_pages_can_be_read(browser: Browser, served: Service) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    for path in PAGES:
        page.goto(f"{served.url}/console{path}")
        assert page.inner_text("h1")
        assert not page.get_by_role("button", name="Copy").first.is_visible()
    page.goto(f"{served.url}/console/playground?mode=search")
    page.click("form.stack button")
    assert page.locator("table.ranking tr").count() == 5
    context.close()
