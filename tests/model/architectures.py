"""Tiny random models of every architecture that is promised to work, and of some that must be refused.

Weights are large, so that outputs vary; Gemma's embeddings are untied, or random ones would repeat one token.
Windows are short, so that every prompt outgrows them. All are in float32 and equal at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
MAX_LEN = 128
WINDOW = 8

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _model(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    # Some releases of transformers drop a soft-cap in their faster attention without a word.
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(config).eval().requires_grad_(False)
    with torch.no_grad():
        # Norms and sinks start as zeros or ones in some architectures, where a mistake would not show.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    # Whatever ends a text would end it at different tokens; lengths are asked for instead.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _like_llama(model: str, config: str, **options: Any) -> Callable[[], PreTrainedModel]:
    return lambda: _model(model, getattr(transformers, config)(**{**_LLAMA_LIKE, **options}))


def _gemma3n() -> PreTrainedModel:
    """Six layers, the last two of which reuse keys and values of the fourth and third."""
    return _model(
        "Gemma3nForCausalLM",
        transformers.Gemma3nTextConfig(
            **_LLAMA_LIKE
            | {
                "num_hidden_layers": 6,
                "head_dim": 8,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "num_kv_shared_layers": 2,
                "intermediate_size": 64,
                "activation_sparsity_pattern": [0.0] * 6,
                "vocab_size_per_layer_input": VOCAB_SIZE,
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 8,
                "altup_num_inputs": 2,
            }
        ),
    )


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _like_llama("LlamaForCausalLM", "LlamaConfig"),
    "mistral": _like_llama("MistralForCausalLM", "MistralConfig", sliding_window=WINDOW),
    "qwen2": _like_llama("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen2-window": _like_llama(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": _like_llama("Qwen3ForCausalLM", "Qwen3Config", head_dim=16),
    "gemma2": _like_llama(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        head_dim=16,
        query_pre_attn_scalar=4,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": _like_llama(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        head_dim=16,
        query_pre_attn_scalar=4,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3n": _gemma3n,
    "phi3": _like_llama("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=4, sliding_window=None),
    "gpt2": lambda: _model(
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=MAX_LEN,
            initializer_range=1.0,
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gpt-neox": _like_llama("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "opt": lambda: _model(
        "OPTForCausalLM",
        transformers.OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LEN,
            init_std=1.0,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "mixtral": _like_llama("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
    "qwen2-moe": _like_llama(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3-moe": _like_llama(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "gpt-oss": _like_llama(
        "GptOssForCausalLM",
        "GptOssConfig",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "stablelm": _like_llama("StableLmForCausalLM", "StableLmConfig"),
    "nemotron": _like_llama("NemotronForCausalLM", "NemotronConfig"),
    "deepseek-v3": _like_llama(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
}
"""Architectures whose greedy tokens must equal `model.generate`'s."""

REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "falcon": (
        lambda: _model(
            "FalconForCausalLM",
            transformers.FalconConfig(
                vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
            ),
        ),
        "computes its attention itself",
    ),
    "bloom": (
        lambda: _model(
            "BloomForCausalLM",
            transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),
        ),
        "computes its attention itself",
    ),
    "gpt-j": (
        lambda: _model(
            "GPTJForCausalLM",
            transformers.GPTJConfig(
                vocab_size=VOCAB_SIZE,
                n_embd=32,
                n_layer=2,
                n_head=4,
                rotary_dim=4,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        "computes its attention itself",
    ),
    "mpt": (
        lambda: _model(
            "MptForCausalLM", transformers.MptConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layers=2, n_heads=4)
        ),
        "computes its attention itself",
    ),
    "llama4": (
        _like_llama(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            num_hidden_layers=4,
            head_dim=8,
            num_local_experts=2,
            intermediate_size_mlp=32,
            attention_chunk_size=8,
        ),
        "layers of type chunked_attention",
    ),
    "lfm2": (
        _like_llama("Lfm2ForCausalLM", "Lfm2Config", layer_types=["conv", "full_attention", "conv"]),
        "layers of type conv",
    ),
    "jamba": (
        _like_llama(
            "JambaForCausalLM",
            "JambaConfig",
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            mamba_d_state=4,
        ),
        "layers of type linear_attention|layers of type mamba",
    ),
    "diffllama": (
        _like_llama("DiffLlamaForCausalLM", "DiffLlamaConfig"),
        "more than once",
    ),
    "t5": (
        lambda: _model(
            "T5ForConditionalGeneration",
            transformers.T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        ),
        "encoder-decoder",
    ),
}
"""Architectures that cannot be served, and what the refusal must say."""
