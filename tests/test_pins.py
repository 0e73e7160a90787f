"""The installed versions are the tested ones, which pyproject.toml pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PINNED = [
    re.match(r"([a-z0-9-]+)==([^ ;]+)", line)
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"][
        "constraint-dependencies"
    ]
]
VERSIONS: dict[str, set[str]] = {}
for pin in PINNED:
    assert pin is not None, "a constraint that is no exact version"
    VERSIONS.setdefault(pin[1], set()).add(pin[2])


def test_users_get_no_development_tools() -> None:
    """`uv run` installs the dependencies of the service, and pytest, which installs the tools: tests/dev_group.py."""
    uv = shutil.which("uv")
    if uv is None or not (ROOT / "uv.lock").exists():
        pytest.skip("installed without uv")
    command = [uv, "export", "--frozen", "--quiet", "--no-hashes", "--no-annotate", "--no-header", "--no-emit-project"]
    users, developers = (
        {
            re.split("[= ;]", line)[0]
            for line in subprocess.check_output([*command, *group], cwd=ROOT, text=True).splitlines()
        }
        for group in ((), ("--group", "dev"))
    )
    tools = {
        "mypy",
        "ruff",
        "import-linter",
        "schemathesis",
        "hypothesis",
        "bitsandbytes",
        "torchao",
        "openai",
        "cohere",
    }
    assert users & tools == set()
    assert tools | users <= developers
    assert {"openvino", "torch", "pytest"} <= users


def test_first_run_of_the_tests_installs_the_tools(tmp_path: Path) -> None:
    """With the arguments of pytest. uv names itself in the environment of the commands that it runs."""
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    uv.chmod(0o755)
    program = (
        "import importlib.util, sys\n"
        "sys.argv = ['pytest', '-q', 'tests/docs']\n"
        "importlib.util.find_spec = lambda name: None\n"
        "import tests.dev_group\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"UV": str(uv)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "run --group dev pytest -q tests/docs\n"), done.stderr


def test_nothing_resolves_unpinned() -> None:
    """Every package of uv.lock, on every platform, has the version that pyproject.toml pins."""
    lock = ROOT / "uv.lock"
    if not lock.exists():
        pytest.skip("installed without uv, so there is no uv.lock to look at")
    locked = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    loose = {
        f"{package['name']}=={package['version']}"
        for package in locked
        if "editable" not in package["source"] and package["version"] not in VERSIONS.get(package["name"], set())
    }
    assert not loose, f"run .ci/pin: {sorted(loose)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/*/isolated/*.in")), ids=lambda path: path.stem)
def test_isolated_environments_are_pinned(path: Path) -> None:
    """Each package that a program in an environment of its own needs has one exact version."""
    lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([a-z0-9-]+)==([^ ;]+)", line) for line in lines]
    assert None not in pins
    wanted = {line.partition("[")[0] for line in path.read_text(encoding="utf-8").split()}
    assert wanted <= {pin[1] for pin in pins if pin is not None}


def test_the_installed_versions_are_the_pinned_ones() -> None:
    """The environment that runs these tests is the one that is described."""
    # Of the environment alone: setuptools, once imported, puts packages of its own on the path.
    here = distributions(path=[sysconfig.get_path("purelib")])
    installed = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in here}
    wrong = {
        name: version
        for name, version in installed.items()
        # A build for one device has a suffix, such as 2.15.0+cpu.
        if name in VERSIONS and version.partition("+")[0] not in VERSIONS[name]
    }
    assert not wrong
    assert {"torch", "transformers", "sentence-transformers", "openvino"} <= installed.keys() & VERSIONS.keys()
