"""What a model's makers recommend for generating with it: generation_config.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vattention.errors import RequestError
from vattention.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
PENALTIES = ("repetition_penalty",)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Attributes:
    eos_token_ids: tokens that end a text; a model may have several, or none.
    sampling: arguments for `SamplingParams`, those only that the makers set.
    """

    eos_token_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def generation_defaults(generation_config: object, *fallbacks: object) -> GenerationDefaults:
    """Read a transformers `GenerationConfig`.

    Args:
        fallbacks: objects whose `eos_token_id` counts where the configuration names none, the first that has one.
    """
    ends: frozenset[int] = frozenset()
    for holder in (generation_config, *fallbacks):
        ends = ends or _ids(getattr(holder, "eos_token_id", None))
    # With do_sample=False generate would be greedy: what else it says about sampling means nothing.
    names = PENALTIES if getattr(generation_config, "do_sample", None) is False else SAMPLING + PENALTIES
    sampling: dict[str, Any] = {}
    for name in names:
        value = getattr(generation_config, name, None)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except (RequestError, TypeError) as error:
            logger.warning("generation_config.json: %s; ignored", error)
        else:
            sampling[name] = value
    return GenerationDefaults(ends, sampling)


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset({value} if isinstance(value, int) else value)
