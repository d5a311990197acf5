"""How many tokens a model's context holds."""

from __future__ import annotations

from typing import Any

from vattention.errors import ConfigError

_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def context_len(text_config: Any, wanted: int | None) -> int:
    """The longest sequence in tokens: `wanted`, or as many as the model was made for.

    A sliding window is no limit: the layers that have one forget what is behind it. YaRN (Peng et al., 2023,
    section 3) multiplies the length that the model was trained for, and some checkpoints state only that one.

    Raises:
        ConfigError: `wanted` is more than the model can do, or nobody says how long the context is.
    """
    limit = max((_whole(getattr(text_config, name, None)) for name in _NAMES), default=0)
    limit = max(limit, *(_yarn_len(parameters) for parameters in _rope_parameters(text_config)), 0)
    if limit == 0 and wanted is None:
        raise ConfigError(
            f"the model's configuration ({text_config.model_type}) does not say how long its context is; "
            "set max_model_len"
        )
    if wanted is not None and 0 < limit < wanted:
        raise ConfigError(f"max_model_len={wanted:,} exceeds the model's context of {limit:,} tokens")
    return wanted or limit


def _rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """One mapping, or one for each type of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _yarn_len(parameters: dict[str, Any]) -> int:
    if parameters.get("rope_type") != "yarn":
        return 0
    return int((parameters.get("original_max_position_embeddings") or 0) * (parameters.get("factor") or 1.0))


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
