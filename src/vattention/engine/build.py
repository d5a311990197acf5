"""From options to the parts an engine runs on: the only place that knows them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vattention.config import EngineConfig
from vattention.kv.build import create_manager
from vattention.kv.manager import KVManager
from vattention.model.loader import load
from vattention.model.optimize import optimize
from vattention.model.probe import probe
from vattention.model.runner import ModelRunner
from vattention.model.tokenizer import Tokenizer
from vattention.model.verify import verify


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine needs of the rooms below it.

    Attributes:
        end_token_ids: tokens that end a text.
        default_sampling: the model's recommended sampling parameters.
    """

    name: str
    manager: KVManager
    runner: ModelRunner
    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    end_token_ids: frozenset[int]
    default_sampling: Mapping[str, Any]


def build(config: EngineConfig) -> Parts:
    """Load, probe, optimise and verify the model, and put a KV cache under it.

    Raises:
        ConfigError, UnsupportedModelError, OutOfMemoryError: as their messages say; nothing is left behind.
    """
    loaded = load(config)
    raise NotImplementedError
