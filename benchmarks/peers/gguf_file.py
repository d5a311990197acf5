"""A checkpoint of transformers as a GGUF file in bfloat16, for Gemma 3 and Llama.

llama.cpp's own converter is in no package. Names of tensors come from the package gguf; two things differ from the
checkpoint: Gemma's norms are stored as 1 + weight, and Llama's Q and K have the two halves of each head's rotation
interleaved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
)
from safetensors import safe_open
from transformers import AutoConfig

ARCHITECTURES = {"gemma3_text": MODEL_ARCH.GEMMA3, "llama": MODEL_ARCH.LLAMA}


def write(checkpoint: Path, file: Path, like: Path | None = None) -> None:
    """Write `checkpoint`'s weights to `file`.

    Args:
        like: a GGUF file of the same model to copy the tokenizer and all else that is no weight from; without it
            the file has no vocabulary and takes token ids only.

    Raises:
        KeyError: the checkpoint's architecture is none of `ARCHITECTURES`.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(file, "gemma3" if architecture is MODEL_ARCH.GEMMA3 else "llama")
    if like is None:
        _describe(writer, config)
    else:
        _copy_fields(GGUFReader(like), writer)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            gguf_name = names.get_name(name, try_suffixes=(".weight",))
            if gguf_name is None:
                raise KeyError(f"{name} has no name in GGUF")
            _add(writer, gguf_name, _laid_out(name, weights.get_tensor(name), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _laid_out(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    if config.model_type == "gemma3_text" and "norm" in name:
        return weight.float() + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type == "llama" and heads is not None:
        halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight


def _add(writer: GGUFWriter, name: str, weight: torch.Tensor) -> None:
    """Matrices as bfloat16, vectors as float32, as llama.cpp wants them."""
    if weight.dim() == 1:
        writer.add_tensor(name, weight.float().numpy())
        return
    raw = weight.bfloat16().contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)


def _describe(writer: GGUFWriter, config: Any) -> None:
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _copy_fields(reader: GGUFReader, writer: GGUFWriter) -> None:
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] is GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
