"""Properties of the image that are visible in the Dockerfile."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from emb_model_provider.settings.loading import load_settings
from tests.container.dockerfile import ROOT, command, exec_form, final, stages, steps, variables

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_image_runs_as_an_unprivileged_user() -> None:
    """The user is a number, so that an orchestrator can see that it is not root."""
    user, _, group = final("USER").partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000


def test_all_files_are_written_to_the_volume() -> None:
    """Every path in the environment variables, except PATH, is on the volume."""
    volume = Path(final("VOLUME"))
    assert volume.is_absolute()
    assert [step.text for step in steps("") if step.name == "VOLUME"] == [str(volume)]
    paths = {name: Path(value) for name, value in variables().items() if value.startswith("/") and name != "PATH"}
    assert paths.pop("HOME") == volume
    assert all(path.is_relative_to(volume) for path in paths.values()), paths


@pytest.mark.parametrize("name", ["MODELSCOPE_CACHE", "HF_HUB_CACHE", "MODEL_CACHE_DIR"])
@pytest.mark.parametrize("source", ["-e", ".env"])
def test_variables_of_the_user_choose_the_cache(name: str, source: str, tmp_path: Path) -> None:
    """The variables of the image have no precedence over `docker run -e` or a mounted `.env`."""
    environment = variables()
    if source == "-e":
        environment[name] = "/models"
    else:
        (tmp_path / ".env").write_text(f"{name}=/models\n", encoding="utf-8")
    settings, _ = load_settings(tmp_path / ".env", environment)
    caches = {settings.hubs.modelscope_cache_dir, settings.hubs.hf_cache_dir} - {None}
    assert caches == {Path("/models")}


def test_service_listens_on_port_9000_of_all_interfaces() -> None:
    """The image declares the port."""
    environment = variables()
    assert environment["EMB_PROVIDER_HOST"] == "0.0.0.0"
    assert environment["EMB_PROVIDER_PORT"] == final("EXPOSE") == "9000"


def test_service_is_the_first_process_and_gets_sigterm() -> None:
    """No shell runs between the container engine and the service."""
    assert final("STOPSIGNAL") == "SIGTERM"
    assert command() == ["emb-provider", "serve"]
    assert exec_form("HEALTHCHECK")[0] == "python"


def test_healthcheck_ignores_the_port_of_a_kubernetes_service() -> None:
    """Kubernetes replaces EMB_PROVIDER_PORT by a URL in pods beside a service named emb-provider."""
    environment = os.environ | {"EMB_PROVIDER_PORT": "tcp://10.0.0.1:80"}
    command = [sys.executable, *exec_form("HEALTHCHECK")[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert "ValueError" not in done.stderr


def test_build_arguments_choose_image_torch_and_package_indexes() -> None:
    """The default is the CPU build of PyTorch, and no index is named, because uv knows where that build is."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert {step.text for stage in stages().values() for step in stage.steps if step.name == "ARG"} == {
        "BASE", "UV_DEFAULT_INDEX", "TORCH=cpu", "TORCH_INDEX",
        "MODEL_NAME", "MODEL_MAPPING", "MODEL_SOURCE=auto", "MODEL_PRECISION=fp32",
    }  # fmt: skip
    assert "://" not in text


def test_base_image_and_uv_are_pinned() -> None:
    """Each stage begins with the one image of the argument BASE, or with another stage."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-[a-z]+$", text, re.MULTILINE)
    assert {stage.base for stage in stages().values()} <= {"${BASE}", *stages()}
    assert re.search(r"pip install .* uv==\d+\.\d+\.\d+$", text, re.MULTILINE)


def test_labels_describe_the_project() -> None:
    """The version and the license are those of pyproject.toml."""
    labels = dict(word.split("=", 1) for word in shlex.split(final("LABEL")))
    assert labels["org.opencontainers.image.title"] == PROJECT["project"]["name"]
    assert labels["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]


def test_change_of_the_code_keeps_the_layer_of_dependencies() -> None:
    """No stage with dependencies copies code, and the images copy both separately."""
    for name in ("uv", "dependencies", "dependencies-slim"):
        assert [step.text for step in stages()[name].steps if step.name == "COPY"] in ([], ["pyproject.toml ./"])
    copied = [step.text.split()[0] for step in stages()["full"].steps]
    assert copied == ["--from=dependencies", "--from=code"]


def test_cuda_image_has_the_packages_for_quantization() -> None:
    """The shell adds the extra only for CUDA, whose builds of PyTorch come from the package index."""
    (install,) = (step.text for step in stages()["dependencies"].steps if "-r pyproject.toml" in step.text)

    def run(**arguments: str) -> str:
        script = f'uv() {{ echo "$@"; }}\n{install}'
        environment = {"TORCH": "cpu", "TORCH_INDEX": "", **arguments}
        return subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout

    assert run() == "pip install --torch-backend=cpu --extra otel -r pyproject.toml\n"
    assert run(TORCH="cuda") == "pip install --extra quantization --extra otel -r pyproject.toml\n"
    assert run(TORCH_INDEX="https://mirror.example.com/cpu") == "pip install --extra otel -r pyproject.toml\n"
    assert {"otel", "quantization"} <= PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("path", ["index", "page"])
def test_torch_comes_from_the_given_index(path: str, tmp_path: Path) -> None:
    """TORCH_INDEX can be a package index or a page with links, as mirrors have it. The version is the pinned one."""
    (version,) = (
        pin.partition("==")[2] for pin in PROJECT["tool"]["uv"]["constraint-dependencies"] if pin.startswith("torch==")
    )
    for directory in (tmp_path / "www" / "index" / "torch", tmp_path / "www" / "page"):
        directory.mkdir(parents=True)
        for each in (f"{version}+cpu", "99.0+cpu"):
            with zipfile.ZipFile(directory / f"torch-{each}-py3-none-any.whl", "w") as wheel:
                name = f"torch-{each}.dist-info"
                wheel.writestr(f"{name}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {each}\n")
                wheel.writestr(f"{name}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{name}/RECORD", "")
    (step,) = (step.text for step in stages()["dependencies"].steps if step.text.endswith(" torch"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    uv = os.environ.get("UV", "uv")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment |= {
            "TORCH_INDEX": f"http://127.0.0.1:{server.server_port}/{path}",
            "VIRTUAL_ENV": str(tmp_path / "venv"), "NO_PROXY": "127.0.0.1", "UV_CACHE_DIR": str(tmp_path / "cache"),
        }  # fmt: skip
        script = f'uv() {{ {shlex.quote(uv)} "$@"; }}\nuv venv -q --python {sys.executable} venv\n{step}'
        done = subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    (installed,) = (tmp_path / "venv").glob("lib/python3.*/site-packages/torch-*.dist-info")
    assert installed.name == f"torch-{version}+cpu.dist-info"


def test_models_of_an_image_are_not_on_the_volume() -> None:
    """A mounted volume does not hide them, and settings of the build apply at the start, too."""
    volume = Path(final("VOLUME"))
    built, served = variables("models"), variables("baked")
    directories = {name: value for name, value in served.items() if name.endswith("_DIR")}
    assert len(directories) == 3
    assert not any(Path(value).is_relative_to(volume) for value in directories.values())
    assert served == {**built, "EMB_PROVIDER_OFFLINE": "true"}
    assert final("USER", "baked") == final("USER")
    settings, warnings = load_settings(Path("/no/such/file"), {**served, **dict.fromkeys(_MODEL, "")})
    assert settings.hubs.offline
    assert warnings == []


_MODEL = [f"EMB_PROVIDER_MODEL_{name}" for name in ("NAME", "MAPPING", "SOURCE", "PRECISION")]


def test_dockerignore_allows_exactly_what_is_copied() -> None:
    """All other files are ignored."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {
        source
        for stage in stages().values()
        for step in stage.steps
        if step.name == "COPY" and not step.text.startswith("--from")
        for source in step.text.split()[:-1]
    }
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == copied


@pytest.mark.parametrize("port", ["{}", '"{}"', "'{}'"])
def test_healthcheck_asks_the_port_of_the_service(port: str) -> None:
    """Also in quotes, which `docker run --env-file` keeps and the service removes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    _, *arguments = exec_form("HEALTHCHECK")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = os.environ | {"EMB_PROVIDER_PORT": port.format(server.server_port)}
        assert subprocess.run([sys.executable, *arguments], env=environ, check=False, timeout=60).returncode == 0
        server.shutdown()
