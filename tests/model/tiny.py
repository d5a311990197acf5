"""Tiny tokenizers and a tiny random Llama, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vattention.model.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello there: the end.",
    "naïve café, über straße",
    "日本語のテキスト",
    "привет мир",
]

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]


def byte_level(**options: Any) -> PreTrainedTokenizerBase:
    """Like GPT-2's: each token is a string of bytes, which may end inside a character."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _finish(backend, **options)


def byte_fallback(**options: Any) -> PreTrainedTokenizerBase:
    """Like Llama 2's: words with a space before them, and a token per byte for what is not in the vocabulary."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        limit_alphabet=40,
    )
    backend.train_from_iterator(CORPUS[:2], trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # The trainer made the bytes special tokens; in a real tokenizer they are ordinary ones.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return _finish(Backend.from_str(json.dumps(state)), **options)


def _finish(backend: Backend, **options: Any) -> PreTrainedTokenizerBase:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )


def tiny_tokenizer(**options: Any) -> Tokenizer:
    return Tokenizer(byte_level(**options))


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama of two layers in float32, for `byte_level`'s vocabulary."""
    settings: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def tiny_folder(path: Path, tokenizer: bool = True, **config: Any) -> Path:
    """A checkpoint of `tiny_llama` with `byte_level`'s tokenizer."""
    tiny_llama(**config).save_pretrained(path)
    if tokenizer:
        byte_level().save_pretrained(path)
    return path
