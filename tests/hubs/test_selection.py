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
    assert select([path, "config.json", "model.safetensors"]) == ["config.json", "model.safetensors"]


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
    model = ["config.json", "model.safetensors"]
    assert select([*model, *exports]) == model
    assert select([*model, *exports], with_export=True) == sorted([*model, *kept])


WHOLE = ["config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "model.safetensors"]
LAYOUTS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "whole model": (
        [*WHOLE, "README.md", "tokenizer_config.json", "vocab.txt", "sentence_bert_config.json", "modeling_own.py"],
        {
            "the same weights in other formats": ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "m.gguf"],
            "not read without `variant`": ["model.fp16.safetensors", "pytorch_model.fp16.bin"],
            "exports": ["onnx/model.onnx", "openvino/openvino_model.xml", "openvino/openvino_model.bin"],
        },
    ),
    "stale index beside complete weights": (
        WHOLE,
        {
            "transformers reads model.safetensors first": [
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "pytorch_model.bin.index.json",
            ]
        },
    ),
    "stale index beside complete torch weights": (
        ["config.json", "pytorch_model.bin"],
        {
            "its shards do not exist": ["model.safetensors.index.json"],
            "transformers reads pytorch_model.bin first": [
                "pytorch_model.bin.index.json",
                "pytorch_model-00001-of-00002.bin",
            ],
        },
    ),
    "torch weights beside a variant as safetensors": (
        ["config.json", "pytorch_model.bin"],
        {"not read without `variant`": ["model.fp16.safetensors", "model.safetensors.index.fp16.json"]},
    ),
    "sharded torch weights beside a variant": (
        ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        {"not read without `variant`": ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"]},
    ),
    "variants only": (
        ["config.json", "model.fp16.safetensors"],
        {"less accurate": ["model.bf16.safetensors", "pytorch_model.fp16.bin"]},
    ),
    "torch variant only": (["config.json", "pytorch_model.fp16.bin"], {}),
    "variant of a module": (["config.json", "model.safetensors", "2_Dense/model.fp16.safetensors"], {}),
    "adapter": (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], {}),
    "adapter with torch weights and modules": (["adapter_config.json", "adapter_model.bin", *WHOLE[1:4]], {}),
    "adapter in a whole model": ([*WHOLE, "adapter_config.json", "adapter_model.safetensors"], {}),
    "leftover configuration of an adapter": (WHOLE, {"it has no weights": ["adapter_config.json"]}),
    "leftover weights of an adapter": (WHOLE, {"it has no configuration": ["adapter_model.safetensors"]}),
    "adapters in folders": (
        [*WHOLE, "lora/README.md"],
        {"no library loads them": ["lora/adapter_config.json", "lora/adapter_model.safetensors"]},
    ),
    "adapters in folders beside code, which can load them": (
        [*WHOLE, "modeling_own.py", "lora/adapter_config.json", "lora/adapter_model.safetensors"],
        {},
    ),
    "adapter in the folder of a module": (
        [*WHOLE, "1_Transformer/adapter_config.json", "1_Transformer/adapter_model.safetensors"],
        {},
    ),
    "ONNX only": (
        ["config.json", "tokenizer.json", "onnx/model.onnx", "onnx/model.onnx_data"],
        {"less accurate": ["onnx/model_quantized.onnx", "onnx/model_fp16.onnx"], "for that": ["onnx/config.json"]},
    ),
    "ONNX only under another name": (
        ["config.json", "model_optimized.onnx"],
        {"less accurate": ["model_optimized_int8.onnx"]},
    ),
    "ONNX beside the weights of a later module": (
        ["config.json", "modules.json", "onnx/model.onnx", "2_Dense/model.safetensors"],
        {},
    ),
    "OpenVINO only": (["config.json", "openvino/openvino_model.xml", "openvino/openvino_model.bin"], {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_is_selected_or_excluded_on_purpose(layout: str) -> None:
    """What the libraries would read is selected, so that the digest covers it; all other files have a reason."""
    selected, excluded = LAYOUTS[layout]
    everything = [*selected, *(path for paths in excluded.values() for path in paths)]
    assert select(everything) == sorted(selected)
    require_model(select(everything), "Repository a/b", available=everything)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "has no weights"),
        (["README.md"], "no config.json .*and no weights"),
        (["model.safetensors"], "no config.json .*not a model"),
        (["model-Q8_0.gguf", "README.md"], r"GGUF weights, which llama.cpp reads \(model-Q8_0.gguf\)"),
        (["config.json", "tf_model.h5"], r"TensorFlow weights \(tf_model.h5\)"),
        (["config.json", "flax_model.msgpack"], r"Flax weights \(flax_model.msgpack\)"),
        (["config.json", "model.fp8.safetensors"], r"variant \(model.fp8.safetensors\)"),
        (["config.json", "a.onnx", "b.onnx"], r"several ONNX files \(a.onnx, b.onnx\)"),
        (["modules.json", "0_Transformer/adapter_config.json"], "LoRA adapter in the folder 0_Transformer"),
        (["adapter_config.json"], "a LoRA adapter without weights"),
        (["adapter_model.safetensors"], "has the weights of a LoRA adapter, but no adapter_config.json"),
        (["config.json", "openvino/openvino_model.xml"], "has no weights"),
    ],
)
def test_error_says_what_is_there(files: list[str], message: str) -> None:
    with pytest.raises(IncompleteRepositoryError, match=rf"Repository a/b.*{message}"):
        require_model(select(files), "Repository a/b", available=files)


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
