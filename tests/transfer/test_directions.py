"""Transfers from ModelScope, to Hugging Face and to a directory, with the same code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import CorruptSnapshotError, LicenseRequiredError, TransferError
from tests.transfer.helpers import DESTINATION, SOURCE, WEIGHTS, model_files
from tests.transfer.servers import listed_sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.transfer.transfer import Transfer
    from tests.transfer.servers import DestinationServer, SourceServer

    Make = Callable[..., Transfer]

# Of huggingface_hub, which passes a stream to its HTTP client in the former way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

LARGE = bytes(11_000_000)
"""Larger than the files that Hugging Face accepts within a commit."""


@pytest.fixture
def modelscope(destination: DestinationServer) -> DestinationServer:
    """Return ModelScope with a repository to read."""
    destination.repos["acme/tiny"] = {**model_files(), "large.bin": LARGE}
    destination.info["acme/tiny"] = {"private": False, "license": "MIT License"}
    return destination


def content_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def expected_files(modelscope: DestinationServer) -> dict[str, bytes]:
    return {path: body for path, body in modelscope.repos["acme/tiny"].items() if path != ".gitattributes"}


def test_modelscope_to_huggingface(transfer: Make, source: SourceServer, modelscope: DestinationServer) -> None:
    """Large files are streamed with LFS, small ones are committed; a second run sends nothing."""
    result = transfer().run("ms:acme/tiny", "hf:mirrors/tiny")
    assert (result.state, result.revision, result.created) == ("done", "master", True)
    stored = source.repos["mirrors/tiny"]
    for path, body in expected_files(modelscope).items():
        assert listed_sha256(stored[path]) == listed_sha256(body), path
    assert source.wrong_blobs() == []
    assert source.commits[-1]["message"] == "Mirror of acme/tiny@master"
    source.received_bytes = 0
    assert transfer().run("ms:acme/tiny", "mirrors/tiny").state == "same"
    assert source.received_bytes == 0


def test_dropped_connections_between_modelscope_and_huggingface(
    transfer: Make, source: SourceServer, modelscope: DestinationServer
) -> None:
    modelscope.faults.drop_after["large.bin"] = [5_000_000]
    source.uploads.drop_put_after[listed_sha256(LARGE)] = [3_000_000]
    assert transfer().run("ms:acme/tiny", "mirrors/tiny").state == "done"
    assert source.wrong_blobs() == []


@pytest.mark.parametrize("prefix", ["ms", "hf"])
def test_a_repository_is_copied_within_its_hub(
    prefix: str, transfer: Make, source: SourceServer, modelscope: DestinationServer
) -> None:
    assert transfer().run(f"{prefix}:acme/tiny", f"{prefix}:mirrors/again").state == "done"
    assert transfer().verify(f"{prefix}:acme/tiny", f"{prefix}:mirrors/again").state == "same"


def test_a_license_is_written_into_the_card_on_huggingface(
    transfer: Make, source: SourceServer, modelscope: DestinationServer
) -> None:
    modelscope.repos["acme/tiny"]["README.md"] = b"# no license\n"
    modelscope.info["acme/tiny"] = {"private": True}
    with pytest.raises(LicenseRequiredError):
        transfer().run("ms:acme/tiny", "mirrors/tiny")
    assert transfer(license="mit").run("ms:acme/tiny", "mirrors/tiny").state == "done"
    assert source.repos["mirrors/tiny"]["README.md"] == b"---\nlicense: mit\n---\n# no license\n"
    assert source.info["mirrors/tiny"]["private"] is True


def test_a_license_that_huggingface_does_not_know_is_replaced(
    transfer: Make, source: SourceServer, modelscope: DestinationServer
) -> None:
    """ModelScope writes `Apache License 2.0`, which Hugging Face refuses."""
    modelscope.repos["acme/tiny"]["README.md"] = b"---\nlicense: Apache License 2.0\n---\n# text\n"
    with pytest.raises(TransferError, match=r"must be one of .* add --license ID"):
        transfer().run("ms:acme/tiny", "mirrors/tiny")
    assert transfer(license="apache-2.0").run("ms:acme/tiny", "mirrors/tiny").state == "done"
    assert source.repos["mirrors/tiny"]["README.md"] == b"---\nlicense: apache-2.0\n---\n# text\n"


@pytest.mark.parametrize("name", [SOURCE, "ms:acme/tiny"])
def test_a_repository_is_copied_to_a_directory(
    name: str, transfer: Make, source: SourceServer, modelscope: DestinationServer, tmp_path: Path
) -> None:
    """Files that are there are kept, and nothing else is left."""
    repo = (modelscope if name.startswith("ms:") else source).repos["acme/tiny"]
    repo |= {"copy.safetensors": WEIGHTS, "other/copy.safetensors": WEIGHTS}
    directory = tmp_path / "copy"
    result = transfer().run(name, f"dir:{directory}")
    assert (result.state, result.created) == ("done", True)
    expected = {path: body for path, body in repo.items() if path != ".gitattributes"}
    assert content_of(directory) == expected
    assert not (directory / ".transfer").exists()
    (directory / "own.txt").write_text("own")
    (directory / "vocab.txt").unlink()
    assert transfer().verify(name, f"dir:{directory}").missing == ("vocab.txt",)
    assert transfer().run(name, f"dir:{directory}").sent == ("vocab.txt",)
    assert content_of(directory) == expected | {"own.txt": b"own"}


def test_links_in_a_directory_are_not_followed(
    transfer: Make, source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    """A folder that is a link is an error, and a file that is a link is replaced; the targets stay unchanged."""
    outside, directory = tmp_path / "outside", tmp_path / "copy"
    outside.mkdir()
    directory.mkdir()
    (outside / "config.json").write_text("mine")
    (directory / "1_Pooling").symlink_to(outside)
    with pytest.raises(TransferError, match="is a link"):
        transfer().run(SOURCE, f"dir:{directory}")
    assert content_of(outside) == {"config.json": b"mine"}
    (directory / "1_Pooling").unlink()
    (directory / "config.json").unlink(missing_ok=True)
    (directory / "config.json").symlink_to(outside / "config.json")
    assert transfer().run(SOURCE, f"dir:{directory}").state == "done"
    assert content_of(outside) == {"config.json": b"mine"}
    assert not (directory / "config.json").is_symlink()


def test_wrong_bytes_do_not_reach_a_directory(
    transfer: Make, source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    source.faults.wrong_bytes = {"model.safetensors": 9}
    with pytest.raises(CorruptSnapshotError):
        transfer().run(SOURCE, f"dir:{tmp_path / 'copy'}")
    assert "model.safetensors" not in content_of(tmp_path / "copy")


def test_a_copy_needs_no_license_on_this_machine(
    transfer: Make, source: SourceServer, destination: DestinationServer, tmp_path: Path
) -> None:
    """A directory has no label that would say something wrong."""
    source.license = ""
    source.repos[SOURCE]["README.md"] = b"# no license\n"
    assert transfer().run(SOURCE, f"dir:{tmp_path / 'copy'}").state == "done"
    assert DESTINATION not in destination.repos
