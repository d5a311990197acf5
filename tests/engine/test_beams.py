"""Groups of beams as pure logic, against brute force: sequences, scores and their order, ties included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.beam_reference import Logits, coarse_logits, search
from vattention.engine.beams import BeamGroup
from vattention.engine.request import Request
from vattention.engine.sequence import Sequence
from vattention.model.proposals import propose
from vattention.outputs import RequestMetrics
from vattention.sampling_params import SamplingParams


def group_of(prompt: list[int], ends: frozenset[int] = frozenset(), **params: Any) -> BeamGroup:
    params = {"use_beam_search": True, "max_tokens": 6, **params}
    request = Request(
        id="x",
        text=None,
        prompt_token_ids=prompt,
        params=SamplingParams(**params),
        priority=0,
        arrival=0,
        max_tokens=params["max_tokens"],
        end_token_ids=ends,
        metrics=RequestMetrics(arrival_time=0.0),
    )
    return BeamGroup(Sequence(request, 0, 0, None))


def step(group: BeamGroup, logits: Logits) -> None:
    offer_all(group, logits)
    group.advance()


def offer_all(group: BeamGroup, logits: Logits) -> None:
    rows = torch.stack([logits(beam.token_ids(0, beam.num_tokens)) for beam in group.live])
    counts = [group.num_proposals] * len(rows)
    proposals = propose(rows, [beam.sample_row() for beam in group.live], counts)
    for beam, own in zip(group.live, proposals, strict=True):
        assert not group.ready
        group.offer(beam, own)
    assert group.ready


def run_to_end(group: BeamGroup, logits: Logits) -> int:
    """Steps it took."""
    steps = 0
    while group.live:
        step(group, logits)
        steps += 1
    return steps


def results(group: BeamGroup) -> list[tuple[tuple[int, ...], float]]:
    return [(tuple(beam.output_token_ids), beam.cumulative_logprob) for beam in group.sequences]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    prompt=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    width=st.integers(1, 5),
    max_tokens=st.integers(1, 6),
    ends=st.frozensets(st.integers(0, 8), max_size=3),
    ignore_eos=st.booleans(),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
)
def test_finds_what_brute_force_finds(
    seed: int,
    prompt: list[int],
    width: int,
    max_tokens: int,
    ends: frozenset[int],
    ignore_eos: bool,
    length_penalty: float,
) -> None:
    logits = coarse_logits(9, seed)
    group = group_of(
        prompt, ends, n=width, max_tokens=max_tokens, ignore_eos=ignore_eos, length_penalty=length_penalty
    )
    assert run_to_end(group, logits) <= max_tokens
    expected = search(
        logits,
        prompt,
        width=width,
        max_tokens=max_tokens,
        ends=frozenset() if ignore_eos else ends,
        length_penalty=length_penalty,
    )
    assert results(group) == [(found.tokens, found.cum_logprob) for found in expected]
    assert [beam.finish_reason for beam in group.sequences] == [
        "stop" if found.ended else "length" for found in expected
    ]


def test_the_search_meets_ties_and_ends() -> None:
    """The test above is worth something only if its models yield equal scores, and sequences that end early."""
    found = [
        search(coarse_logits(9, seed), [1], width=4, max_tokens=5, ends=frozenset({0, 1})) for seed in range(30)
    ]
    assert sum(len({each.score for each in best}) < len(best) for best in found) > 10
    assert sum(any(each.ended for each in best) and not all(each.ended for each in best) for best in found) > 5


def test_the_sooner_a_search_may_stop_the_fewer_steps_it_takes() -> None:
    steps: dict[object, int] = dict.fromkeys((True, False, "never"), 0)
    for seed in range(20):
        logits = coarse_logits(9, seed)
        for early_stopping in steps:
            group = group_of(
                [1], frozenset({0, 1}), n=3, max_tokens=12, length_penalty=0.2, early_stopping=early_stopping
            )
            steps[early_stopping] += run_to_end(group, logits)
    assert steps[True] < steps[False] < steps["never"] < 20 * 12


def test_a_stop_token_ends_a_beam_as_the_end_token_does() -> None:
    group = group_of([1], stop_token_ids=[0, 3], n=4)
    run_to_end(group, coarse_logits(9, 1))
    expected = search(coarse_logits(9, 1), [1], width=4, max_tokens=6, ends=frozenset({0, 3}))
    assert results(group) == [(found.tokens, found.cum_logprob) for found in expected]
    assert {beam.stop_reason for beam in group.sequences} & {0, 3}


def test_no_beam_ends_before_min_tokens() -> None:
    group = group_of([1], frozenset({0, 1, 2, 3}), n=4, min_tokens=3, max_tokens=5, length_penalty=0)
    run_to_end(group, coarse_logits(9, 1))
    assert min(len(beam.output_token_ids) for beam in group.sequences) == 4  # three tokens, then one that ends


def test_a_vocabulary_smaller_than_the_width() -> None:
    group = group_of([1], n=8, max_tokens=4)
    run_to_end(group, coarse_logits(3, 5))
    expected = search(coarse_logits(3, 5), [1], width=8, max_tokens=4)
    assert results(group) == [(found.tokens, found.cum_logprob) for found in expected]


def test_each_parent_has_one_heir_and_all_others_fork_from_it() -> None:
    group = group_of([1], n=5, max_tokens=8)
    logits = coarse_logits(9, 2)
    seen_dead = False
    while True:
        before = list(group.live)
        rows = torch.stack([logits(beam.token_ids(0, beam.num_tokens)) for beam in before])
        for beam, own in zip(
            before, propose(rows, [b.sample_row() for b in before], [10] * len(before)), strict=True
        ):
            group.offer(beam, own)
        heirs = group.advance()
        if not group.live:
            break
        assert len({branch.parent for branch in heirs}) == len(heirs)
        children = [branch.child for branch in heirs] + [fork.child for fork in group.forks]
        assert sorted(map(id, children)) == sorted(map(id, group.live))
        length = before[0].num_tokens
        assert group.fork_at == length
        for fork in group.forks:
            assert fork.parent in [branch.child for branch in heirs]
            assert fork.parent.token_ids(0, length) == fork.child.token_ids(0, length)
            assert group.num_computable(fork.parent) == length
            assert group.num_computable(fork.child) == length + 1
        seen_dead |= len(heirs) < len(before)
    assert seen_dead


def test_a_group_that_starts_again_forks_where_its_beams_part() -> None:
    group = group_of([1, 2, 3], n=4, max_tokens=8)
    logits = coarse_logits(9, 4)
    for _ in range(4):
        step(group, logits)
    offer_all(group, logits)
    leader = group.restart()
    assert leader is group.live[0]
    assert [fork.child for fork in group.forks] == group.live[1:]
    assert {fork.parent for fork in group.forks} == {leader}
    at = group.fork_at
    assert len({tuple(beam.token_ids(0, at)) for beam in group.live}) == 1
    assert len({tuple(beam.token_ids(0, at + 1)) for beam in group.live}) > 1
    assert not group.ready
    run_to_end(group, logits)
    expected = search(logits, [1, 2, 3], width=4, max_tokens=8)
    assert results(group) == [(found.tokens, found.cum_logprob) for found in expected]


@pytest.mark.parametrize("logprobs", [0, 3, 20])
def test_reports_the_likeliest_tokens_of_each_step(logprobs: int) -> None:
    group = group_of([1], n=2, logprobs=logprobs)
    run_to_end(group, coarse_logits(30, 3))
    for beam in group.sequences:
        assert len(beam.logprobs) == len(beam.output_token_ids)
        total = 0.0
        for token, report in zip(beam.output_token_ids, beam.logprobs, strict=True):
            total += report[token].logprob
            assert logprobs <= len(report) <= logprobs + 1
            assert {entry.rank for entry in report.values()} >= set(range(1, logprobs + 1))
        assert beam.cumulative_logprob == total
