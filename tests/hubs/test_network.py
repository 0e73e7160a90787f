"""Hubs that fail for a moment, ask to wait or do not answer, and proxies and certificates, with the real clients."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import trustme

from emb_model_provider.errors import AccessDeniedError, HubUnavailableError, OperationCancelledError, SettingsError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.hubs.network import Patience, advice_about, ask, share_certificates
from emb_model_provider.progress import CancelToken
from emb_model_provider.settings.loading import load_settings
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files, modelscope_files, spec
from tests.hubs.helpers import server_of
from tests.hubs.servers import HubServer, HuggingFaceServer, ModelScopeServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from emb_model_provider.settings import HubSettings

CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables with a file of certificates."""
FAST = Patience(pauses_s=(0.0, 0.0), max_pause_s=5.0, warn_s=0.05, answer_s=0.2)


# --- failures of a moment -----------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "position"), [(429, 0), (599, 0), (503, 1), (599, 2)])
def test_one_failure_does_not_end_a_download_from_hugging_face(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, status: int, position: int
) -> None:
    """Neither of the commit, nor of the listing, nor of the files. 599 is a connection that is closed."""
    answer = huggingface.answer
    seen: list[str] = []

    def answer_with_fault(request: object) -> object:
        if len(seen) == position and not huggingface.faults.next_statuses:
            huggingface.faults.next_statuses.append(status)
        seen.append(request.path)  # type: ignore[attr-defined]
        return answer(request)  # type: ignore[arg-type]

    huggingface.answer = answer_with_fault  # type: ignore[method-assign, assignment]
    snapshot = fetch_snapshot(spec(HF_REPO), settings())
    assert (snapshot.path / "model.safetensors").read_bytes() == WEIGHTS
    assert len(seen) > position


def test_a_pause_that_the_hub_asks_for_is_made(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Retry-After, if it is short."""
    huggingface.faults.next_statuses, huggingface.faults.retry_after = [429], "2"
    assert fetch_snapshot(spec(HF_REPO), settings())
    assert "it is asked again in 2 s" in caplog.text


def test_a_long_pause_is_an_error_that_names_it(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """An hour of silence would look like a hang."""
    huggingface.faults.next_statuses, huggingface.faults.retry_after = [429], "3600"
    with pytest.raises(HubUnavailableError, match=r"HTTP 429.*in 3600 s"):
        fetch_snapshot(spec(HF_REPO), settings())
    assert len(huggingface.requests) == 1


def test_modelscope_that_asks_for_an_hour_does_not_hang(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client sleeps for as long as the hub asks. That is reported, can be cancelled, and ends with an error."""
    from modelscope_hub import HubApi
    from modelscope_hub import HubConfig as ClientConfig

    modelscope.faults.next_statuses, modelscope.faults.retry_after = [429], "3600"
    cancel = CancelToken()
    timer = threading.Timer(2.0, cancel.cancel)
    timer.start()
    with pytest.raises(OperationCancelledError):
        fetch_snapshot(spec(MS_REPO, source="modelscope"), settings(), cancel=cancel)
    timer.join()
    modelscope.faults.next_statuses = [429]
    api = HubApi(ClientConfig(endpoint=modelscope.url))
    with pytest.raises(HubUnavailableError, match=r"ModelScope has not answered for .* s.*HTTP 429"):
        ask("ModelScope", lambda: api.list_repo_revisions(MS_REPO, "model"), lambda: None, lambda _: None, FAST)
    assert "ModelScope has not answered" in caplog.text


def test_other_errors_are_not_repeated(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    """They would fail again."""
    huggingface.faults.status = 403
    with pytest.raises(AccessDeniedError):
        fetch_snapshot(spec(HF_REPO), settings())
    assert huggingface.asked("/revision/main") == 1


def test_the_last_error_of_several_is_raised() -> None:
    """After the pauses are used up."""
    errors: list[ConnectionResetError] = []

    def work() -> None:
        errors.append(ConnectionResetError(str(len(errors))))
        raise errors[-1]

    with pytest.raises(ConnectionResetError, match="2"):
        ask("A hub", work, lambda: None, lambda _: 0.0, FAST)
    assert len(errors) == 3


# --- Xet ----------------------------------------------------------------------------------------------

XET = """
import logging, sys
from pathlib import Path
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.settings import HubSettings
from emb_model_provider.model_spec import ModelSpec
logging.basicConfig(level=logging.WARNING)
endpoint, directory = sys.argv[1], Path(sys.argv[2])
settings = HubSettings(cache_dir=directory / "own", hf_cache_dir=directory / "hub", hf_endpoint=endpoint)
print(fetch_snapshot(ModelSpec(alias="tiny", name="acme/tiny", source="huggingface"), settings).path)
"""


@pytest.mark.slow
def test_download_without_xet_if_its_host_cannot_be_reached(tmp_path: Path, huggingface: HuggingFaceServer) -> None:
    """The warning names the host and what to do, and the files are downloaded. In a process, whose client has no state."""
    huggingface.faults.xet_url = "http://127.0.0.1:9"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_HOME": str(tmp_path)
    }
    command = [sys.executable, "-c", XET, huggingface.url, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert huggingface.asked("/xet") > 0, "the client does not use Xet"
    assert "HF_HUB_DISABLE_XET=1" in done.stderr
    assert "xethub.hf.co" in done.stderr


# --- endpoints, tokens, proxies and certificates ------------------------------------------------------


@pytest.mark.parametrize("variable", ["EMB_PROVIDER_HF_ENDPOINT", "HF_ENDPOINT", "EMB_PROVIDER_MODELSCOPE_ENDPOINT"])
@pytest.mark.parametrize(
    ("text", "url"),
    [(" https://hub.example/ ", "https://hub.example"), ("https://hub.example//", "https://hub.example"),
     ("HTTP://hub.example/sub/", "HTTP://hub.example/sub"), ("hub.example", None), ("hub.example:8080", None), ("https://", None),
     ("ftp://hub.example", None), ("https://hub .example", None)],
)  # fmt: skip
def test_endpoints(tmp_path: Path, variable: str, text: str, url: str | None) -> None:
    """Slashes at the end and blanks around are removed; without a scheme the error shows how to write it."""
    if url is None:
        with pytest.raises(SettingsError, match="must be a URL that begins with https:// or http://, like https://"):
            load_settings(tmp_path / ".env", {variable: text})
        return
    hubs = load_settings(tmp_path / ".env", {variable: text})[0].hubs
    assert url in (hubs.hf_endpoint, hubs.modelscope_endpoint)


def test_slash_at_the_end_of_an_endpoint(settings: Callable[..., HubSettings], huggingface: HuggingFaceServer) -> None:
    """It was requested as `//api/models`, which the hub does not have."""
    snapshot = fetch_snapshot(spec(HF_REPO), settings(hf_endpoint=f"{huggingface.url}/ "))
    assert snapshot.path.is_dir()


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_rejected_token_of_a_login_is_named(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    home: Path,
    repo: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The user may not remember that there is one."""
    if repo == HF_REPO:
        token = home / "stored-token"
        token.write_text("hf_stored")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(token))
        expected = f"the token that `hf auth login` stored in {token} was rejected"
    else:
        from modelscope_hub import HubConfig as ClientConfig

        config = ClientConfig()
        config.save_token("ms-stored")
        expected = f"the token that `modelscope login` stored in {config.credentials_dir} was rejected"
    server, _ = server_of(repo, huggingface, modelscope)
    server.faults.status = 403
    with pytest.raises(AccessDeniedError) as caught:
        fetch_snapshot(spec(repo, source="huggingface" if repo == HF_REPO else "modelscope"), settings())
    assert expected in str(caught.value)
    assert "ms-stored" not in str(caught.value)


PROXY = """
import os, sys
from pathlib import Path
from emb_model_provider.errors import HubError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.settings import HubSettings
from emb_model_provider.model_spec import ModelSpec
hub, endpoint, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
settings = HubSettings(
    cache_dir=directory / "own", hf_cache_dir=directory / "hub", modelscope_cache_dir=directory / "ms",
    hf_endpoint=endpoint, modelscope_endpoint=endpoint,
)
try:
    print("path", fetch_snapshot(ModelSpec(alias="tiny", name=sys.argv[4], source=hub), settings).path)
except HubError as error:
    print(error)
"""


def run_behind_proxy(tmp_path: Path, hub: str, url: str, **variables: str) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("HF_") and name not in CERTIFICATES
    }
    repo = HF_REPO if hub == "huggingface" else MS_REPO
    done = subprocess.run(
        [sys.executable, "-c", PROXY, hub, url, str(tmp_path), repo],
        env=kept | {"HF_HOME": str(tmp_path), **variables}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_proxy_is_used(
    tmp_path: Path, huggingface: HuggingFaceServer, modelscope: ModelScopeServer, hub: str, scheme: str
) -> None:
    """Both clients need a package for it, which is installed."""
    server = huggingface if hub == "huggingface" else modelscope
    with SocksServer() as proxy:
        output = run_behind_proxy(tmp_path, hub, server.url, all_proxy=f"{scheme}://127.0.0.1:{proxy.port}")
        assert output.startswith("path "), output
        assert proxy.connections > 0


@pytest.mark.slow
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "socks5://127.0.0.1:9", "http://127.0.0.1:9"])
def test_wrong_proxy_is_named(tmp_path: Path, huggingface: HuggingFaceServer, hub: str, proxy: str) -> None:
    """The advice is about the variable of the proxy, not about the endpoint of the hub."""
    output = run_behind_proxy(tmp_path, hub, "http://hub.example", ALL_PROXY=proxy)
    assert "Check the proxy in ALL_PROXY" in output


def test_advice_about_certificates() -> None:
    """For the error of OpenSSL, wherever it is among the causes."""
    error = ConnectionError("failed")
    error.__cause__ = ssl.SSLCertVerificationError("self-signed certificate in certificate chain")
    assert "SSL_CERT_FILE" in advice_about(error)
    assert "SSL_CERT_FILE" in advice_about(OSError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer"))
    assert advice_about(ConnectionError("refused")) == ""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return an authority that no client knows, such as that of a company's proxy."""
    return trustme.CA()


@pytest.fixture(params=["huggingface", "modelscope"])
def hub_with_tls(request: pytest.FixtureRequest, authority: trustme.CA) -> Iterator[HubServer]:
    """Yield a hub, and its storage host, with certificates of the authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    if request.param == "huggingface":
        server: HubServer = HuggingFaceServer({HF_REPO: model_files()}, tls=context)
    else:
        server = ModelScopeServer({MS_REPO: modelscope_files()}, tls=context)
    with server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_hub_behind_an_own_authority(
    tmp_path: Path, hub_with_tls: HubServer, authority: trustme.CA, variable: str
) -> None:
    """Either documented variable is sufficient for both hubs, and the error without it names what to set."""
    hub = "huggingface" if isinstance(hub_with_tls, HuggingFaceServer) else "modelscope"
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    refused = run_behind_proxy(tmp_path, hub, hub_with_tls.url)
    assert "set SSL_CERT_FILE to a file with the certificate of this authority" in refused
    assert hub_with_tls.requests == []
    output = run_behind_proxy(tmp_path, hub, hub_with_tls.url, **{variable: str(file)})
    assert output.startswith("path "), output
    assert any(request.storage for request in hub_with_tls.requests)


@pytest.mark.parametrize("name", CERTIFICATES)
def test_both_clients_use_the_certificates_of_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One variable is sufficient. What is set is not changed."""
    file = tmp_path / "ca.pem"
    file.touch()
    for each in CERTIFICATES:
        monkeypatch.setenv(each, "")
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, str(file))
    share_certificates()
    assert os.environ["SSL_CERT_FILE"] == os.environ["REQUESTS_CA_BUNDLE"] == str(file)


class SocksServer:
    """A SOCKS5 proxy without authentication, for connections to addresses and names of this machine."""

    def __init__(self) -> None:
        import socketserver

        outer = self
        self.connections = 0

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                import select
                import socket

                client = self.request
                client.recv(2 + client.recv(2)[1])
                client.sendall(b"\x05\x00")
                kind = client.recv(4)[3]
                host = socket.inet_ntoa(client.recv(4)) if kind == 1 else client.recv(client.recv(1)[0]).decode()
                port = int.from_bytes(client.recv(2), "big")
                outer.connections += 1
                with socket.create_connection((host, port)) as target:
                    client.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
                    while True:
                        for ready in select.select([client, target], [], [], 30)[0]:
                            data = ready.recv(65536)
                            if not data:
                                return
                            (target if ready is client else client).sendall(data)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.port = self._server.server_address[1]

    def __enter__(self) -> SocksServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
