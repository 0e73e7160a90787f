"""Selection of the files of a repository."""

from __future__ import annotations

import pytest

from emb_model_provider.errors import IncompleteRepositoryError
from emb_model_provider.hubs.selection import require_model, select


def test_torch_weights_are_left_out_beside_safetensors() -> None:
    """A Dense module that only has pytorch_model.bin keeps it."""
    paths = ["model.safetensors", "pytorch_model.bin", "2_Dense/pytorch_model.bin", "2_Dense/config.json"]
    assert select(paths) == ["2_Dense/config.json", "2_Dense/pytorch_model.bin", "model.safetensors"]


def test_shards_and_their_index_are_selected() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    torch = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    assert select(shards + torch) == sorted(shards)
    assert select(torch) == sorted(torch)


@pytest.mark.parametrize(
    "path",
    [
        ".gitattributes",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "openvino/openvino_model.xml",
        "sub/onnx/config.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model-Q4_K_M.GGUF",
        "assets/image.PNG",
        "optimizer.pt",
    ],
)
def test_files_that_serving_never_needs_are_left_out(path: str) -> None:
    assert select([path, "config.json"]) == ["config.json"]


@pytest.mark.parametrize(
    ("exports", "kept"),
    [
        (["onnx/model.onnx", "onnx/model_O2.onnx", "onnx/model_qint8_avx512.onnx"], ["onnx/model.onnx"]),
        (["model.onnx", "model.onnx_data"], ["model.onnx", "model.onnx_data"]),
        (
            ["onnx/model.onnx", "openvino/openvino_model.bin", "openvino/openvino_model.xml", "openvino/openvino_model_qint8_quantized.xml"],
            ["openvino/openvino_model.bin", "openvino/openvino_model.xml"],
        ),
        (["onnx/model_fp16.onnx", "2_Other/model.onnx", "openvino/openvino_model.bin"], []),
    ],
)  # fmt: skip
def test_one_export_is_selected_on_request(exports: list[str], kept: list[str]) -> None:
    """It is the first that can replace the compiler's own, with its weights; variants of it are left out."""
    assert select(["config.json", *exports]) == ["config.json"]
    assert select(["config.json", *exports], with_export=True) == ["config.json", *kept]


@pytest.mark.parametrize("export", ["onnx/model.onnx", "onnx/model_quantized.onnx", "openvino/openvino_model.xml"])
def test_error_of_a_repository_of_exports_names_the_export(export: str) -> None:
    with pytest.raises(IncompleteRepositoryError, match=rf"no weights.*only an export \({export}\)"):
        require_model(["config.json"], "Repository a/b", available=["config.json", export])
    with pytest.raises(IncompleteRepositoryError, match=r"no weights .*\. Choose a repository or a revision"):
        require_model(["config.json"], "Repository a/b", available=["config.json"])


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "configuration.json",
        "1_Pooling/config.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
        "merges.txt",
        "modeling_custom.py",
        "README.md",
        "adapter_model.safetensors",
    ],
)
def test_files_that_serving_can_need_are_selected(path: str) -> None:
    assert select([path]) == [path]
