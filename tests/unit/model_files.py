"""Model directories of which only headers are written: enough for what is counted from them."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_headers(directory: Path, tensors: Mapping[str, Sequence[int]], config: Mapping[str, int]) -> Path:
    """A model directory whose safetensors file names `tensors` and holds none of them."""
    directory.mkdir()
    entries = {name: {"dtype": "F32", "shape": list(shape)} for name, shape in tensors.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tiny_model(directory: Path) -> Path:
    """A model of 10 * 4 + 4 = 44 parameters: two layers, four heads of two, of which two hold keys and values."""
    shape = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 16, "vocab_size": 10}
    return write_headers(directory, {"embed": [10, 4], "norm": [4]}, shape)


def seven_billion(directory: Path) -> Path:
    """Qwen2.5-7B: 7,615,616,512 parameters, as its authors give them."""
    h, m, v, kv = 3584, 18944, 152064, 512
    tensors: dict[str, Sequence[int]] = {"model.embed_tokens.weight": [v, h], "lm_head.weight": [v, h]}
    tensors["model.norm.weight"] = [h]
    for i in range(28):
        layer = f"model.layers.{i}"
        for name, size in (("q", h), ("k", kv), ("v", kv)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = [size, h]
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = [size]
        tensors[f"{layer}.self_attn.o_proj.weight"] = [h, h]
        tensors |= {f"{layer}.mlp.{name}_proj.weight": [m, h] for name in ("gate", "up")}
        tensors[f"{layer}.mlp.down_proj.weight"] = [h, m]
        tensors |= {f"{layer}.{name}.weight": [h] for name in ("input_layernorm", "post_attention_layernorm")}
    shape = {"num_hidden_layers": 28, "hidden_size": h, "intermediate_size": m, "vocab_size": v}
    return write_headers(directory, tensors, shape | {"num_attention_heads": 28, "num_key_value_heads": 4})
