"""The parts of the hubs' clients that transfers use and that are not documented. They fail here if a version changes them."""

from __future__ import annotations

import inspect
import io
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.lfs import UploadInfo
from modelscope_hub import HubApi, HubConfig, constants

from tests.transfer.helpers import TOKEN
from tests.transfer.servers import listed_sha256

if TYPE_CHECKING:
    from tests.transfer.servers import DestinationServer


def test_the_legacy_client_of_modelscope(destination: DestinationServer) -> None:
    """All methods in the order of a transfer: create, ask, upload, commit, list, read."""
    api = HubApi(HubConfig(endpoint=destination.url, token=TOKEN))
    api.create_repo("a/b", "model", visibility="private", license="mit")
    body = b"weights"
    sha256 = listed_sha256(body)
    urls = api.legacy.validate_blobs("a/b", "model", [{"oid": sha256, "size": len(body)}])
    assert set(urls) == {sha256}
    api.legacy.upload_blob(urls[sha256] or "", io.BytesIO(body), len(body))
    assert api.legacy.validate_blobs("a/b", "model", [{"oid": sha256, "size": len(body)}]).get(sha256) is None
    operation = {"action": "create", "path": "w.bin", "type": "lfs", "size": len(body), "sha256": sha256}
    api.legacy.create_commit("a/b", "model", [operation], "message", revision="master")
    (listed,) = (each for each in api.list_repo_files("a/b", "model", revision="master") if each.path == "w.bin")
    assert (listed.sha256, listed.size, listed.is_dir) == (sha256, len(body), False)
    with api.legacy.download_stream("a/b", "model", "w.bin", "master", {"Range": "bytes=3-"}) as response:
        assert b"".join(response.iter_content(1 << 20)) == body[3:]


def test_without_a_license_the_client_labels_a_repository_apache(destination: DestinationServer) -> None:
    """So a transfer always passes one."""
    HubApi(HubConfig(endpoint=destination.url, token=TOKEN)).create_repo("a/b", "model")
    assert destination.info["a/b"]["license"] == "Apache-2.0"


def test_limits_of_modelscope() -> None:
    """The names that must be inline (in upper case), the suffixes and sizes of LFS files, and the size of a commit."""
    assert {"README.MD", "CONFIG.JSON", "CONFIGURATION.JSON"} <= constants.UPLOAD_INLINE_METADATA_PATHS
    assert {".safetensors", ".bin"} <= set(constants.MODEL_LFS_SUFFIX)
    assert constants.UPLOAD_LFS_FORCE_THRESHOLD_BYTES == 64 * 1024
    assert constants.COMMIT_MAX_ACTIONS_PER_REQUEST == 2000


@pytest.mark.parametrize("method", ["preupload_lfs_files", "create_commit", "create_repo", "list_repo_tree"])
def test_methods_of_the_hugging_face_client(method: str) -> None:
    assert "repo_id" in inspect.signature(getattr(HfApi, method)).parameters


def test_an_operation_of_the_hugging_face_client_can_know_its_hash() -> None:
    """`StreamOperation` sets it, so that a stream is read only once."""
    info = UploadInfo(size=3, sample=b"abc", sha256=bytes(32))
    assert info.is_hashed
    operation = CommitOperationAdd("a", io.BytesIO(b"abc"))
    assert operation._upload_mode is None
    assert callable(operation.as_file)
