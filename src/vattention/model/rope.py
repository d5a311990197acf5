"""Rotary embeddings whose frequencies follow the longest position of a batch, made to stay.

LongRoPE (arXiv 2402.13753) has two sets of frequencies, one for texts up to the original context and one for
longer ones; dynamic NTK scaling has one for every length. transformers picks by the longest position in the batch,
so that one long request would change the rotations of all others, and keys already cached would not match.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vattention.errors import UnsupportedModelError

_FIXED = "fixed"
"""A kind of RoPE that transformers' per-batch update does not know, and so leaves alone."""


def fix_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Make the model's rotary frequencies those for texts of `max_model_len` tokens, whatever a batch holds.

    Raises:
        UnsupportedModelError: the frequencies follow each text's length; a smaller `max_model_len` avoids it.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = _fix(model, module, kinds, None, max_model_len)
        elif isinstance(kinds, dict):
            module.rope_type = {
                layer_type: _fix(model, module, kind, layer_type, max_model_len)
                for layer_type, kind in kinds.items()
            }


def _fix(model: PreTrainedModel, module: Any, kind: str, layer_type: str | None, max_model_len: int) -> str:
    """Fix one set of frequencies, and return the kind it has from now on."""
    if kind != "longrope" and "dynamic" not in kind:
        return kind
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    original = parameters.get("original_max_position_embeddings") or module.config.max_position_embeddings
    if max_model_len <= original:
        return kind
    if kind != "longrope" or not hasattr(type(module).forward, "__wrapped__"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has {kind} RoPE, which rotates a text by its own length beyond "
            f"{original} tokens; set max_model_len to {original} or less, not {max_model_len}"
        )
    prefix = "" if layer_type is None else f"{layer_type}_"
    current: torch.Tensor = getattr(module, f"{prefix}inv_freq")
    keywords = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, current.device, seq_len=original + 1, **keywords)
    module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    return _FIXED
