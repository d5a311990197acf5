"""vattention: an LLM serving engine whose KV cache is contiguous in virtual memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vattention.garbage import no_collections

if TYPE_CHECKING:
    from vattention.config import EngineConfig
    from vattention.core import TextPrompt, TokensPrompt
    from vattention.engine.async_engine import AsyncEngine
    from vattention.llm import LLM
    from vattention.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, RequestOutput
    from vattention.sampling_params import BeamSearchParams, SamplingParams
    from vattention.structured_outputs import StructuredOutputsParams
    from vattention.virtual_cache import VirtualCache

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": "vattention.engine.async_engine",
    "BeamSearchOutput": "vattention.outputs",
    "BeamSearchParams": "vattention.sampling_params",
    "BeamSearchSequence": "vattention.outputs",
    "CompletionOutput": "vattention.outputs",
    "EngineConfig": "vattention.config",
    "LLM": "vattention.llm",
    "RequestOutput": "vattention.outputs",
    "SamplingParams": "vattention.sampling_params",
    "StructuredOutputsParams": "vattention.structured_outputs",
    "TextPrompt": "vattention.core",
    "TokensPrompt": "vattention.core",
    "VirtualCache": "vattention.virtual_cache",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "VirtualCache",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import vattention` and the command line's help do not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vattention' has no attribute {name!r}")
    with no_collections():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # from now on it is found without asking here
    return value
