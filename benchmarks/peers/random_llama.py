"""A Llama of 1.1 thousand million random weights: TinyLlama's shape, which every engine knows.

Speed does not depend on what the weights say. The tokenizer is there because some engines ask for one: bytes, and
names for the rest of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
END, BEGIN = 2, 1


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=END,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write(folder: Path, made: LlamaConfig | None = None) -> None:
    """Write the checkpoint, in bfloat16, and the tokenizer into `folder`."""
    made = config() if made is None else made
    torch.manual_seed(SEED)
    model = LlamaForCausalLM._from_config(made, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=END)
    model.save_pretrained(folder)
    tokenizer(made.vocab_size).save_pretrained(folder)


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Bytes, with tokens of no use to fill the vocabulary up to `size`."""
    names = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    names += [f"<unused{index}>" for index in range(size - len(names))]
    inner = Tokenizer(BPE({name: token for token, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
