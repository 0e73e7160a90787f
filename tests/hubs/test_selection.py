"""Which files of a repository are fetched."""

from __future__ import annotations

import pytest

from emb_model_provider.errors import IncompleteRepositoryError
from emb_model_provider.hubs.selection import require_model, select
from emb_model_provider.snapshots.snapshot import is_safe_path


def test_torch_weights_go_only_where_their_directory_has_safetensors() -> None:
    """A Dense module that comes as pytorch_model.bin stays, beside a transformer in safetensors."""
    paths = ["model.safetensors", "pytorch_model.bin", "2_Dense/pytorch_model.bin", "2_Dense/config.json"]
    assert select(paths) == ["2_Dense/config.json", "2_Dense/pytorch_model.bin", "model.safetensors"]


def test_shards_and_their_index_are_kept() -> None:
    """All parts of sharded weights are needed; those of the other format are not."""
    shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    torch = [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]
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
        "assets/picture.PNG",
        "optimizer.pt",
    ],
)
def test_what_serving_never_needs_is_left_out(path: str) -> None:
    """Exports, weights of other frameworks, training state and pictures stay at the hub."""
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
def test_one_export_is_kept_where_it_is_at_hand(exports: list[str], kept: list[str]) -> None:
    """The first that can stand in for the compile step's own, with its weights, and no variant of it."""
    assert select(["config.json", *exports]) == ["config.json"]
    assert select(["config.json", *exports], with_export=True) == ["config.json", *kept]


@pytest.mark.parametrize(
    "export", ["onnx/model.onnx", "onnx/model_quantized.onnx", "openvino/openvino_model.xml"]
)
def test_a_repository_of_exports_is_told_what_it_lacks(export: str) -> None:
    """It is not just `no weights`: the error says what there is, and why it will not do."""
    with pytest.raises(IncompleteRepositoryError, match=rf"no weights.*only an export \({export}\)"):
        require_model(["config.json"], "Repository a/b", list_dir=["config.json", export])
    with pytest.raises(IncompleteRepositoryError, match=r"no weights .*\. Choose a repository or a revision"):
        require_model(["config.json"], "Repository a/b", list_dir=["config.json"])


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
def test_what_serving_may_need_is_kept(path: str) -> None:
    """Configurations, tokenizers of every kind, and a repository's own code are fetched."""
    assert select([path]) == [path]


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("a.json", True),
        ("1_Pooling/config.json", True),
        ("..config", True),
        ("模型.json", True),
        ("", False),
        ("/a", False),
        ("../a", False),
        ("a/../../b", False),
        ("a/..", False),
        ("a//b", False),
        ("./a", False),
        ("a\\b", False),
        ("C:a", False),
        ("a\0", False),
        ("a/", False),
    ],
)
def test_a_safe_path_stays_inside(path: str, safe: bool) -> None:
    """Nothing absolute, nothing with `..`, nothing that another platform reads in another way."""
    assert is_safe_path(path) is safe
