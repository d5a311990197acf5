"""The sampler against a plain float64 implementation that sorts everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.model.test_gumbel import exact_gumbel, hashed
from vattention.errors import RequestError
from vattention.model import cut as cutting
from vattention.model import draw as drawing
from vattention.model import sampler
from vattention.model.gumbel import likeliest, noise_for
from vattention.model.predictions import GivenLogits
from vattention.model.sampler import SampledToken, SampleRow, prompt_logprobs, sample, validate
from vattention.native import Largest, Noise
from vattention.sampling_params import SamplingParams

VOCAB = 60
PROMPT = [3, 5, 5, 9]
OUTPUT = [9, 9, 11, 40]
END = frozenset({1, 2})


@pytest.fixture(autouse=True, params=["row by row", "all rows at once"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor, and as on a GPU."""
    monkeypatch.setattr(sampler, "_sorts_well", lambda logits: request.param == "all rows at once")
    # Not all rows of a batch at a time.
    monkeypatch.setattr(cutting, "_NUMBERS_AT_A_TIME", 50 * VOCAB)


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
    if params.allowed_token_ids:
        x = [v if token in params.allowed_token_ids else -math.inf for token, v in enumerate(x)]
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
    {"allowed_token_ids": [4, 9, 11, 30], "repetition_penalty": 1.5},
    {"allowed_token_ids": [4, 9, 11], "temperature": 0.0},
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
    """Each draw is the largest of the exact log-probabilities with the noise of its seed and position."""
    number_of_draws = 700
    for seed in range(2):
        logits = some_logits(seed)
        logits[[1, 7]] += 3.0  # an end token and a stop token that matter
        logits[30] = logits[31]  # a tie
        exact = reference(logits, row(**params))
        wanted = [row(i, **params) for i in range(number_of_draws)]
        tokens = np.array([token.token_id for token in sampled(logits.expand(number_of_draws, -1), wanted)])
        with np.errstate(divide="ignore"):
            noisy = np.log(exact) + noise_on(np.zeros(VOCAB), number_of_draws)
        np.testing.assert_array_equal(tokens, noisy.argmax(-1))


def noise_on(logits: NDArray[np.float64], number_of_draws: int) -> NDArray[np.float64]:
    """[draws, V]: logits with the noise at a temperature of 1 of seeds from 0 on, after OUTPUT."""
    noise = noise_for([(seed, len(OUTPUT), 1.0) for seed in range(number_of_draws)])
    assert noise is not None
    ids = np.arange(len(logits), dtype=np.uint64)
    return np.stack([logits + exact_gumbel(hashed(int(key), ids)) for key in noise["key"]])


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.4}, {"temperature": 6.0}, {"top_p": 0.9}, {"top_k": 12, "temperature": 1.5}],
    ids=str,
)
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


@pytest.mark.parametrize("step", ["seed", "token"])
def test_consecutive_draws_are_independent(step: str) -> None:
    """Of a sequence, and of a request's samples, whose seeds follow each other: all pairs are as frequent."""
    vocab, pairs = 8, 4000
    steps = range(pairs + 1)
    rows = [row(i) for i in steps] if step == "seed" else [row(1234, output=[0] * i) for i in steps]
    tokens = np.array([token.token_id for token in sampled(torch.zeros(1, vocab).expand(len(rows), -1), rows)])
    expected = pairs / vocab**2
    counts = np.bincount(tokens[:-1] * vocab + tokens[1:], minlength=vocab**2)
    freedom = vocab**2 - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4.5 * math.sqrt(2 * freedom)


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


@pytest.mark.parametrize("params", [{}, {"top_p": 0.99}, {"temperature": 1e9}, {"temperature": 1e300}], ids=str)
def test_impossible_tokens_are_never_drawn(params: dict[str, Any]) -> None:
    logits = torch.full((3000,), -math.inf)
    logits[[700, 701, 2900]] = torch.tensor([1.0, 3.0, -2.0])
    tokens = {token.token_id for token in sampled(logits.expand(500, -1), [row(i, **params) for i in range(500)])}
    assert tokens == {700, 701, 2900} - ({2900} if params == {"top_p": 0.99} else set())


def test_the_way_to_a_token_does_not_change_it() -> None:
    """Cuts that leave all tokens, a report, an adjustment of nothing: all compute logits, and draw the same."""
    logits = torch.stack([some_logits(i, vocab=5000) for i in range(40)])
    ways: list[dict[str, Any]] = [{}, {"top_k": 5000}, {"min_p": 1e-30}, {"logprobs": 0}, {"logit_bias": {3: 0.0}}]
    for temperature in (0.3, 1.0, 40.0):
        tokens = [sampled(logits, [row(i, temperature=temperature, **way) for i in range(40)]) for way in ways]
        token_ids = [[token.token_id for token in own] for own in tokens]
        assert token_ids == [token_ids[0]] * len(ways)


class WithoutLogits(GivenLogits):
    """Predictions whose logits nobody should ask for."""

    def likeliest(self, rows: Sequence[int], noise: Noise | None = None) -> Largest:
        return likeliest(super().logits(rows), noise)

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        raise AssertionError("logits were computed")


def test_temperature_alone_needs_no_logits() -> None:
    logits = torch.stack([some_logits(i, vocab=3000) for i in range(4)])
    rows = [row(0), row(1, temperature=0.0), row(2, temperature=2.5), row(3, temperature=0.0)]
    tokens = sample(WithoutLogits(logits), range(4), rows)
    assert tokens == sampled(logits, rows)
    assert [tokens[i].token_id for i in (1, 3)] == logits[[1, 3]].argmax(-1).tolist()
    for params in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 1}, {"presence_penalty": 1.0}):
        with pytest.raises(AssertionError, match="were computed"):
            sample(WithoutLogits(logits), [0], [row(**params)])


def test_near_zero_temperature_is_greedy() -> None:
    logits = torch.stack([some_logits(i, vocab=3000) for i in range(50)])
    for temperature in (1e-6, 1e-5, 1e-4):
        tokens = sampled(logits, [row(i, temperature=temperature) for i in range(50)])
        assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


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
    ("params", "name"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
    ],
)
def test_token_ids_out_of_range_are_refused(params: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError, match=f"{name}.*0 to {VOCAB - 1}") as caught:
        validate(SamplingParams(**params), VOCAB)
    assert caught.value.param == name
    validate(SamplingParams(logit_bias={VOCAB - 1: 1.0}, stop_token_ids=[0]), VOCAB)


def test_the_last_token_of_a_bad_word_is_impossible_behind_the_others() -> None:
    logits = torch.zeros(VOCAB)
    logits[[7, 8, 9, 10]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    params = SamplingParams(temperature=0.0, bad_words=["named here, and below as tokens"])

    def chosen(output: list[int], *bad_words: list[int]) -> int:
        return sample_one(logits, SampleRow(params, 0, PROMPT, output, END, None, bad_words)).token_id

    assert chosen([], [7], [5, 8]) == 8
    assert chosen([5], [7], [5, 8]) == 9
    assert chosen([4, 5], [7], [5, 8], [4, 5, 9]) == 10
    assert chosen([5, 4], [7], [5, 8], [4, 5, 9]) == 8
    assert chosen([5], [7], [*PROMPT[-1:], 5, 8]) == 8  # of the prompt nothing counts
