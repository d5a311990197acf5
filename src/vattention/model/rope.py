"""Rotary embeddings whose frequencies follow the longest position of a batch, made to stay.

LongRoPE (arXiv 2402.13753) has two sets of frequencies, one for texts up to the original context and one for
longer ones; dynamic NTK scaling has one for every length. transformers picks by the longest position in the batch,
so that one long request would change the rotations of all others, and keys already cached would not match.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vattention.errors import UnsupportedModelError

_FIXED = "fixed"
"""A kind of RoPE that transformers' update of each batch does not know, and so leaves alone."""


def fix_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Make the model's rotary frequencies those for texts of `max_model_len` tokens, whatever a batch holds.

    Raises:
        UnsupportedModelError: the frequencies follow each text's length; a smaller `max_model_len` avoids it.
    """
    for rope in _ropes(model):
        if max_model_len <= rope.original_len:
            continue
        if rope.kind == "longrope":
            rope.fix_long(model.device)
        if rope.kind != "longrope" or rope.follows_batch(model.device):
            raise UnsupportedModelError(
                f"{type(model).__name__} has {rope.kind} RoPE, which rotates a text by its own length beyond "
                f"{rope.original_len} tokens; set max_model_len to {rope.original_len} or less, not {max_model_len}"
            )


@dataclass(frozen=True, slots=True)
class _Rope:
    """Rotary frequencies that follow the batch: a module's only ones, or those of one type of layers."""

    module: Any
    kind: str
    layer_type: str | None

    @property
    def original_len(self) -> int:
        """Up to so many tokens the frequencies stay what they were when the model was made."""
        config = self.module.config
        parameters = config.rope_parameters if self.layer_type is None else config.rope_parameters[self.layer_type]
        return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)

    @property
    def _keywords(self) -> dict[str, str]:
        return {} if self.layer_type is None else {"layer_type": self.layer_type}

    def fix_long(self, device: torch.device) -> None:
        """Take the frequencies for long texts, for good."""
        frequencies, _ = ROPE_INIT_FUNCTIONS[self.kind](
            self.module.config, device, seq_len=self.original_len + 1, **self._keywords
        )
        name = "inv_freq" if self.layer_type is None else f"{self.layer_type}_inv_freq"
        self.module.register_buffer(name, frequencies, persistent=False)
        if self.layer_type is None:
            self.module.rope_type = _FIXED
        else:
            self.module.rope_type[self.layer_type] = _FIXED

    def follows_batch(self, device: torch.device) -> bool:
        """Whether a token is still rotated in another way beside a long text: some models switch by themselves."""
        alone, beside = (
            self.module(
                torch.zeros(1, 1, device=device), torch.tensor([positions], device=device), **self._keywords
            )
            for positions in ([1], [1, self.original_len])
        )
        return not all(one[0, 0].equal(other[0, 0]) for one, other in zip(alone, beside, strict=True))


def _ropes(model: PreTrainedModel) -> Iterator[_Rope]:
    """All rotary frequencies in the model that follow the batch."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        sets = [(None, kinds)] if isinstance(kinds, str) else list((kinds or {}).items())
        for layer_type, kind in sets:
            if kind == "longrope" or "dynamic" in kind:
                yield _Rope(module, kind, layer_type)
