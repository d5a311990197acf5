"""What an engine needs of the rooms below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vattention.core import AttentionSpec
from vattention.kv.manager import KVManager

if TYPE_CHECKING:
    from vattention.kv.swap import SwapSpace
    from vattention.model.runner import ModelRunner
    from vattention.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Parts:
    """A model that is loaded and verified, and the cache under it.

    Attributes:
        cache_specs: per layer that stores keys and values, as `KVManager.layer` counts them.
        fingerprint: of the model's weights.
        end_token_ids: tokens that end a text.
        default_sampling: the model's recommended sampling parameters.
        swap_space: where preempted sequences are kept; None to compute them again.
    """

    name: str
    manager: KVManager
    runner: ModelRunner
    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    end_token_ids: frozenset[int]
    default_sampling: Mapping[str, Any]
    cache_specs: Sequence[AttentionSpec] = ()
    fingerprint: str = ""
    swap_space: SwapSpace | None = None
