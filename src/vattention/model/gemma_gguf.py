"""Gemma 3 270M from a GGUF file to a checkpoint of transformers.

Transformers can do this too, but takes three times as long, since it reads the file's vocabulary three times over,
and releases before 5.23 make another tokenizer of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFReader, TokenType, dequantize, get_tensor_name_map
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

END_TOKEN_IDS = [1, 106]
"""<eos> and <end_of_turn>; the GGUF file names only the first."""

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
"""Of Gemma 3 270M; what is not here has the default of `Gemma3TextConfig`."""


def convert(file: Path, folder: Path, progress: Callable[[float], object]) -> None:
    """Write the checkpoint, in bfloat16, and its tokenizer into `folder`.

    Args:
        progress: told about what share of the whole time has passed.
    """
    reader = GGUFReader(file)
    progress(0.5)
    weights = {}
    for name, weight in _weights(reader):
        weights[name] = weight
        progress(0.5 + 0.2 * len(weights) / len(reader.tensors))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = Gemma3TextConfig(**ARCHITECTURE, architectures=[Gemma3ForCausalLM.__name__], dtype="bfloat16")
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=2, eos_token_id=END_TOKEN_IDS, pad_token_id=0).save_pretrained(folder)
    _save(_tokenizer(reader), folder)
    progress(1.0)


def _weights(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Transformers' names and tensors. GGUF files hold Gemma's norms as 1 + weight."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, ARCHITECTURE["num_hidden_layers"])
    with torch.device("meta"):
        wanted = Gemma3ForCausalLM(Gemma3TextConfig(**ARCHITECTURE)).model.state_dict(prefix="model.")
    for name in wanted:
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        yield name, (weight - 1 if "norm" in name else weight).bfloat16()


def _tokenizer(reader: GGUFReader) -> GemmaTokenizer:
    """Gemma's tokenizer. Its merges are not in the file, but follow from the vocabulary's order.

    Tokens of nothing but spaces are written with spaces in the file, all others with U+2581.
    """
    tokens = [
        token if token.strip(" ") else "\u2581" * len(token)
        for token in reader.fields["tokenizer.ggml.tokens"].contents()
    ]
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [token for token, own in zip(tokens, kinds, strict=True) if own == kind]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
    return tokenizer


def _save(tokenizer: GemmaTokenizer, folder: Path) -> None:
    """Write a tokenizer so that it loads quickly.

    Transformers reads a file of Gemma's class twice as JSON and builds the tokenizer anew; one of no model's class
    is read once, as it is, if the added tokens are in the configuration too.
    """
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        padding_side=tokenizer.padding_side,
        **tokenizer.special_tokens_map,
    )
    plain.save_pretrained(folder)
    path, serialized = folder / "tokenizer_config.json", json.loads(tokenizer.backend_tokenizer.to_str())
    added = {str(token.pop("id")): token for token in serialized["added_tokens"]}
    # Releases before 5 know the class by this name only.
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    path.write_text(json.dumps(json.loads(path.read_text()) | named, indent=2), encoding="utf-8")
