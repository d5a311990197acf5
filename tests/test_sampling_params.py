from __future__ import annotations

from typing import Any

import numpy as np
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": "5"}, "max_tokens must be an integer or None, not '5'"),
        ({"max_tokens": 5.0}, "max_tokens must be an integer or None, not 5.0"),
        ({"logprobs": True}, "logprobs must be an integer or None, not True"),
        ({"top_k": 1.5}, "top_k must be an integer, not 1.5"),
        ({"n": None}, "n must be an integer, not None"),
        ({"temperature": "0.5"}, "temperature must be a number, not '0.5'"),
        ({"seed": "a"}, "seed must be an integer or None, not 'a'"),
        ({"ignore_eos": "false"}, "ignore_eos must be True or False, not 'false'"),
        ({"stop": [1]}, r"stop must be a string or a list of strings, not \[1\]"),
        ({"stop": ["a", ""]}, "stop must be non-empty strings"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of integers, not 5"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be a list of integers, not '5'"),
        ({"logit_bias": {"x": 1}}, "logit_bias must be a mapping of integers to numbers, not"),
        ({"logit_bias": [1]}, "logit_bias must be a mapping of integers to numbers, not"),
        ({"use_beam_search": True, "early_stopping": 1}, "early_stopping must be True, False or 'never', not 1"),
    ],
)
def test_values_of_other_types_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refusal:
        SamplingParams(**values)
    assert refusal.value.param in values


def test_numbers_of_numpys_and_other_collections_become_pythons_own() -> None:
    values: dict[str, Any] = {
        "top_k": np.int64(3),
        "temperature": np.float32(0.5),
        "stop_token_ids": np.array([4, 5]),
        "stop": ["a"],
        "logit_bias": {"7": 1, np.int64(8): np.float64(2)},
    }
    params = SamplingParams(**values)
    assert (params.top_k, params.temperature, params.stop, params.stop_token_ids) == (3, 0.5, ("a",), (4, 5))
    assert params.logit_bias == {7: 1.0, 8: 2.0}
    assert [type(number) for number in (params.top_k, params.temperature, *params.logit_bias)] == [
        int,
        float,
        int,
        int,
    ]
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()  # type: ignore[arg-type]
