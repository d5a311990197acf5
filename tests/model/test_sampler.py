"""The sampler against a plain float64 implementation that sorts everything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vattention.errors import RequestError
from vattention.model import draw as drawing
from vattention.model.draw import uniform
from vattention.model.predictions import GivenLogits
from vattention.model.sampler import SampledToken, SampleRow, prompt_logprobs, sample, validate
from vattention.sampling_params import SamplingParams

VOCAB = 60
PROMPT = [3, 5, 5, 9]
OUTPUT = [9, 9, 11, 40]
END = frozenset({1, 2})


def row(seed: int = 0, output: list[int] = OUTPUT, **params: Any) -> SampleRow:
    return SampleRow(SamplingParams(**params), seed, PROMPT, output, END)


def sampled(logits: torch.Tensor, rows: list[SampleRow]) -> list[SampledToken]:
    return sample(GivenLogits(logits), range(len(rows)), rows)


def sample_one(logits: torch.Tensor, wanted: SampleRow) -> SampledToken:
    return sampled(logits[None], [wanted])[0]


def some_logits(seed: int, vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def reference(logits: torch.Tensor, wanted: SampleRow) -> NDArray[np.float64]:
    """The exact probabilities of the next token, step by step over plain lists."""
    params = wanted.params
    x = [float(v) for v in logits]
    if len(wanted.output_token_ids) < params.min_tokens:
        for token in {*wanted.end_token_ids, *params.stop_token_ids}:
            x[token] = -math.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in {*wanted.prompt_token_ids, *wanted.output_token_ids}:
        x[token] *= params.repetition_penalty if x[token] < 0 else 1 / params.repetition_penalty
    for token in set(wanted.output_token_ids):
        x[token] -= params.presence_penalty
        x[token] -= params.frequency_penalty * list(wanted.output_token_ids).count(token)
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.greedy:
        certain = np.zeros(len(x))
        certain[order[0]] = 1.0
        return certain
    p = {token: math.exp((x[token] - x[order[0]]) / params.temperature) for token in order}
    p = {token: v for token, v in p.items() if v >= params.min_p * (1 - 1e-6)}
    if params.top_k > 0:
        p = dict(list(p.items())[: params.top_k])
    total, running, kept = sum(p.values()), 0.0, {}
    for token, v in p.items():
        if running >= params.top_p * total:
            break
        kept[token] = v
        running += v
    out = np.zeros(len(x))
    for token, v in kept.items():
        out[token] = v / running
    return out


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB + 5},
    {"top_p": 0.1},
    {"top_p": 0.8, "temperature": 2.0},
    {"top_p": 0.9999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"min_p": 0.05, "top_k": 5, "top_p": 0.7, "temperature": 1.7},
    {"top_k": 20, "top_p": 0.5},
    {"min_p": 0.1, "top_p": 0.6, "temperature": 3.0},
    {"logit_bias": {4: 3.5, 9: -100.0}},
    {"logit_bias": {4: 100.0}, "temperature": 0.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -1.2},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5, "presence_penalty": 0.3, "frequency_penalty": 0.7, "logit_bias": {9: 2.0}},
    {"repetition_penalty": 3.0, "temperature": 0.0},
    {"min_tokens": 5, "stop_token_ids": [7]},
    {"min_tokens": 4, "stop_token_ids": [7]},
]


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_draws_follow_the_exact_distribution(params: dict[str, Any]) -> None:
    """Inverting the CDF at evenly spaced numbers gives each token its probability up to one part."""
    number_of_draws = 700
    for seed in range(2):
        logits = some_logits(seed)
        logits[[1, 7]] += 3.0  # an end token and a stop token that matter
        logits[30] = logits[31]  # a tie
        exact = reference(logits, row(**params))
        wanted = [row(i, **params) for i in range(number_of_draws)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vattention.model.sampler.uniform", lambda s, _: (s + 0.5) / number_of_draws)
            tokens = sampled(logits.expand(number_of_draws, -1), wanted)
        counts = np.bincount([token.token_id for token in tokens], minlength=VOCAB)
        assert not counts[exact == 0].any()
        np.testing.assert_allclose(counts / number_of_draws, exact, atol=1.5 / number_of_draws)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 12, "temperature": 1.5}], ids=str)
def test_seeds_sample_the_distribution(params: dict[str, Any]) -> None:
    """Pearson's chi-square over many seeds; 4.5 standard deviations above its mean would be a 1 in 10^5 event."""
    draws = 4000
    logits = some_logits(5, vocab=15, spread=1.0)
    wanted = [row(seed, output=[], **params) for seed in range(draws)]
    exact = reference(logits, SampleRow(wanted[0].params, 0, [], [], END))
    counts = np.bincount([t.token_id for t in sampled(logits.expand(draws, -1), wanted)], minlength=15)
    possible = exact > 0
    chi_square = ((counts - draws * exact)[possible] ** 2 / (draws * exact[possible])).sum()
    freedom = possible.sum() - 1
    assert not counts[~possible].any()
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom)


def test_consecutive_draws_of_one_sequence_are_independent() -> None:
    numbers = np.array([uniform(1234, index) for index in range(10_000)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.015
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(numbers, [uniform(1235, index) for index in range(10_000)])[0, 1]) < 0.05


def test_a_sample_does_not_depend_on_the_batch() -> None:
    logits = torch.stack([some_logits(i, vocab=3000) for i in range(12)])
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.7},
        {"top_k": 5},
        {"min_p": 0.1},
        {"temperature": 2.5},
    ]
    rows = [row(i, **params) for i, params in enumerate(kinds * 2)]
    together = [token.token_id for token in sampled(logits, rows)]
    alone = [sample_one(logits[i], rows[i]).token_id for i in range(12)]
    backwards = [token.token_id for token in sampled(logits.flip(0), rows[::-1])][::-1]
    assert together == alone == backwards


def test_seed_and_position_determine_a_sample() -> None:
    logits = torch.zeros(5000)
    outputs = [sample_one(logits, row(seed, output=[0] * n)).token_id for seed in (1, 2) for n in range(20)]
    again = [sample_one(logits, row(seed, output=[0] * n)).token_id for seed in (1, 2) for n in range(20)]
    assert outputs == again
    assert len(set(outputs)) > 35


@pytest.mark.parametrize("vocab", [VOCAB, 1000, 40_000, 100_000])
@pytest.mark.parametrize("spread", [0.0, 0.2, 4.0])
@pytest.mark.parametrize("bf16", [False, True])
def test_cuts_of_large_vocabularies(vocab: int, spread: float, bf16: bool) -> None:
    """The shortcuts for large vocabularies keep the very tokens that sorting all of them keeps, ties included."""
    logits = some_logits(vocab, vocab, spread)
    if bf16:
        logits = logits.bfloat16().float()
    values = logits.numpy()
    order = np.lexsort((np.arange(vocab), -values))
    for count in (1, 5, 64, 500, vocab - 1):
        np.testing.assert_array_equal(drawing.top(values, count), order[:count])
    weights = np.exp(values - values.max())
    sums = np.cumsum(weights[order].astype(np.float64))
    for top_p in (0.05, 0.5, 0.95):
        kept = drawing._nucleus(values, weights, top_p)
        margin = 1e-5  # of the total, which is summed in another order
        assert sums[len(kept) - 1] >= (top_p - margin) * sums[-1]
        assert len(kept) == 1 or sums[len(kept) - 2] <= (top_p + margin) * sums[-1]
        np.testing.assert_array_equal(kept, np.sort(order[: len(kept)]))


def test_inverting_never_hits_an_impossible_token() -> None:
    weights = np.zeros(3000, np.float32)
    weights[[700, 701, 2900]] = [1e-3, 1.0, 1e-30]
    for number in (0.0, 1e-12, 0.5, 1 - 2**-53):
        assert drawing._invert(weights, number) in (700, 701, 2900)
    assert drawing._invert(weights, 0.0) == 700
    assert drawing._invert(weights, 0.5) == 701


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(100)
    logits[[20, 70]] = 4.0
    assert sample_one(logits, row(temperature=0.0)).token_id == 20
    assert sample_one(logits, row(top_k=1)).token_id == 20


def test_logprobs_are_of_the_unmodified_logits() -> None:
    logits = some_logits(3)
    expected = torch.log_softmax(logits.double(), -1)
    ranked = expected.argsort(descending=True)
    token = sample_one(logits, row(4, logprobs=5, temperature=3.0, presence_penalty=2.0, logit_bias={12: 50.0}))
    assert token.token_id == 12
    assert token.logprob == pytest.approx(expected[12].item(), abs=1e-5)
    assert next(iter(token.top)) == 12
    assert set(token.top) == {12, *ranked[:5].tolist()}
    for token_id, entry in token.top.items():
        assert entry.logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
        assert entry.rank == 1 + (expected > expected[token_id]).sum().item()


def test_logprobs_zero_reports_the_chosen_token_only() -> None:
    token = sample_one(some_logits(3), row(logprobs=0))
    assert list(token.top) == [token.token_id]
    assert sample_one(some_logits(3), row()).logprob is None


def test_equal_logits_have_different_ranks() -> None:
    token = sample_one(torch.zeros(50), row(logprobs=3, logit_bias={30: 100.0}))
    assert {t: entry.rank for t, entry in token.top.items()} == {30: 31, 0: 1, 1: 2, 2: 3}


def test_prompt_logprobs() -> None:
    logits = torch.stack([some_logits(i) for i in range(4)])
    token_ids = [7, 8, 9, 10]
    reports = prompt_logprobs(logits, token_ids, 2)
    for i, (token, report) in enumerate(zip(token_ids, reports, strict=True)):
        expected = torch.log_softmax(logits[i].double(), -1)
        assert set(report) == {token, *expected.topk(2).indices.tolist()}
        assert report[token].logprob == pytest.approx(expected[token].item(), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5, "logprobs": 2}], ids=str)
def test_bad_logits_are_the_error_of_their_row_alone(bad: float, params: dict[str, Any]) -> None:
    logits = torch.stack([some_logits(i) for i in range(3)])
    logits[1, 8] = bad
    tokens = sampled(logits, [row(**params)] * 3)
    assert "float32" in str(tokens[1].error)
    assert tokens[0].error is None
    assert tokens[0] == sampled(logits[:1], [row(**params)])[0]
    assert tokens[2].error is None


def test_no_token_left_is_an_error() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[list(END)] = 1.0
    token = sample_one(logits, row(min_tokens=10, temperature=0.0))
    assert "min_tokens" in str(token.error)


def test_masked_logits_are_harmless() -> None:
    logits = some_logits(1)
    logits[10:20] = -math.inf
    logits[20:30] = torch.finfo(torch.float32).min
    for params in ({"temperature": 0.01}, {"top_p": 0.99}, {"top_k": 55}, {"logprobs": 20}):
        token = sample_one(logits, row(**params))
        assert token.error is None
        assert not 10 <= token.token_id < 30


def test_sampling_leaves_the_logits_alone() -> None:
    logits = torch.stack([some_logits(i) for i in range(2)])
    before = logits.clone()
    sampled(logits, [row(repetition_penalty=2.0, min_tokens=9, logit_bias={3: 1.0}, top_p=0.5, logprobs=3)] * 2)
    assert torch.equal(logits, before)


def test_an_empty_batch() -> None:
    assert sampled(torch.empty(0, VOCAB), []) == []


@pytest.mark.parametrize(
    ("params", "name"), [({"logit_bias": {VOCAB: 1.0}}, "logit_bias"), ({"stop_token_ids": [-1]}, "stop_token_ids")]
)
def test_token_ids_out_of_range_are_refused(params: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError, match=f"{name}.*0 to {VOCAB - 1}") as caught:
        validate(SamplingParams(**params), VOCAB)
    assert caught.value.param == name
    validate(SamplingParams(logit_bias={VOCAB - 1: 1.0}, stop_token_ids=[0]), VOCAB)
