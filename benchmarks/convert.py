"""Converts the bundled model for other servers. Runs in their environments, which have the libraries.

python benchmarks/convert.py {onnx,gguf-f16,gguf-q8_0,sie} MODEL DIRECTORY
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def convert_to_onnx(model: Path, directory: Path) -> None:
    """Write `model.onnx` (fp32) and the files of the tokenizer."""
    from optimum.exporters.onnx import main_export

    main_export(str(model), str(directory), task="feature-extraction", library_name="transformers", device="cpu")
    # Those that the export writes limit texts to 128 tokens.
    for path in model.glob("*token*.json"):
        shutil.copy(path, directory)


def convert_to_gguf(model: Path, directory: Path, quantization: str) -> None:
    """Write `model.gguf`: a BERT with the matrices of its layers in `quantization`, and all else in fp32."""
    import gguf
    import numpy as np
    import safetensors.numpy

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(directory / "model.gguf", "bert")
    writer.add_name(model.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    kind = gguf.GGMLQuantizationType[quantization]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantization}"])

    words = (model / "vocab.txt").read_text(encoding="utf-8").splitlines()
    special = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "bos": "[CLS]", "mask": "[MASK]"}
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(config["type_vocab_size"])
    # llama.cpp marks the start of a word instead of its continuation.
    marked = [word if word in special.values() else word[2:] if word[:2] == "##" else f"\u2581{word}" for word in words]
    writer.add_token_list(marked)
    kinds = [gguf.TokenType.CONTROL if word in special.values() else gguf.TokenType.NORMAL for word in words]
    writer.add_token_types(kinds)
    for name, word in special.items():
        getattr(writer, f"add_{name}_token_id")(words.index(word))

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in safetensors.numpy.load_file(model / "model.safetensors").items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None or "pooler" in name:  # such as position_ids
            continue
        array = tensor.astype(np.float32)
        if array.ndim == 2 and target.startswith("blk."):
            writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert_to_sie(model: Path, directory: Path) -> None:
    """Write a copy of the model, and SIE's own configuration of it with the path of the copy."""
    import sie_server
    import yaml

    name = "sentence-transformers/all-MiniLM-L6-v2"
    path = Path(sie_server.__file__).parent / "models" / f"{name.replace('/', '__')}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    del config["hf_id"], config["hf_revision"]
    config["weights_path"] = str(shutil.copytree(model, directory / "weights"))
    config["profiles"] = {"default": config["profiles"]["default"]}
    (directory / path.name).write_text(yaml.safe_dump(config), encoding="utf-8")


FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "onnx": convert_to_onnx,
    "gguf-f16": partial(convert_to_gguf, quantization="F16"),
    "gguf-q8_0": partial(convert_to_gguf, quantization="Q8_0"),
    "sie": convert_to_sie,
}

if __name__ == "__main__":
    FORMATS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
