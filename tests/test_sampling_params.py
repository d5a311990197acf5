from __future__ import annotations

from typing import Any

import pytest

from vattention.errors import RequestError
from vattention.sampling_params import BeamSearchParams, SamplingParams


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"beam_width": 2}, "beam_width"),
        ({"use_beam_search": True, "n": 3, "beam_width": 2}, "beam_width"),
        ({"use_beam_search": True, "best_of": 3, "beam_width": 2}, "beam_width"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"use_beam_search": True, "length_penalty": float("inf")}, "length_penalty"),
        ({"use_beam_search": True, "length_penalty": float("nan")}, "length_penalty"),
        ({"use_beam_search": True, "early_stopping": "soon"}, "early_stopping"),
    ],
)
def test_what_makes_no_search_is_refused(values: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**values)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("values", "width", "returned"),
    [
        ({"n": 3}, 3, 3),
        ({"best_of": 4}, 4, 1),
        ({"beam_width": 4}, 4, 1),
        ({"n": 2, "beam_width": 4}, 4, 2),
        ({"best_of": 4, "beam_width": 4}, 4, 1),
    ],
)
def test_the_width_of_a_search_and_what_it_returns(values: dict[str, int], width: int, returned: int) -> None:
    params = SamplingParams(use_beam_search=True, **values)  # type: ignore[arg-type]
    assert (params.num_sequences, params.n) == (width, returned)


def test_samples_are_ranked_by_log_probability_only_where_some_are_left_out() -> None:
    assert SamplingParams(n=2).num_logprobs is None
    assert SamplingParams(n=2, best_of=2).num_logprobs is None
    assert SamplingParams(n=2, best_of=3).num_logprobs == 0
    assert SamplingParams(n=2, best_of=3, logprobs=4).num_logprobs == 4


@pytest.mark.parametrize(("field", "value"), [("beam_width", 0), ("max_tokens", 0), ("length_penalty", 99.0)])
def test_beam_search_params_are_checked(field: str, value: float) -> None:
    values: dict[str, Any] = {"beam_width": 2, "max_tokens": 4, field: value}
    with pytest.raises(RequestError) as refusal:
        BeamSearchParams(**values)
    assert refusal.value.param == field
