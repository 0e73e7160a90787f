"""Helpers of the hubs' tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.hubs.conftest import HF_REPO

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hubs.servers import HubServer, HuggingFaceServer, ModelScopeServer


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def server_of(name: str, huggingface: HuggingFaceServer, modelscope: ModelScopeServer) -> tuple[HubServer, str]:
    """Return the server of a repository, and the name of its file of weights."""
    return (huggingface, "model.safetensors") if name == HF_REPO else (modelscope, "pytorch_model.bin")


def files_below(*directories: Path) -> set[Path]:
    """Return the files, links and directories below some directories, except locks and what contains only locks."""
    found = [path for directory in directories for path in directory.rglob("*")]
    kept = [path for path in found if path.suffix != ".lock" and (path.is_symlink() or not path.is_dir())]
    empty = [path for path in found if path.is_dir() and not any(path.iterdir())]
    return {*kept, *empty}
