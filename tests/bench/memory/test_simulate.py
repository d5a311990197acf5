from __future__ import annotations

from dataclasses import replace

import pytest

from vattention.bench.memory.device import EFFICIENCY, SEQUENCE_S, SimulatedDevice
from vattention.bench.memory.prefix import with_prefix_cache
from vattention.bench.memory.scenarios import ON_HOST, PAPER_SHAREGPT, SCENARIOS, Scenario
from vattention.bench.memory.shapes import A100_40, OPT_13B
from vattention.bench.memory.simulate import running_lengths, simulate
from vattention.bench.memory.variants import GPU, HOST, MAX, ORACLE, PAGED, POW2, Variant
from vattention.core import Chunk


@pytest.mark.parametrize(("scenario", "variant"), [(PAPER_SHAREGPT, GPU), (ON_HOST, HOST)])
def test_almost_all_of_the_memory_holds_tokens(scenario: Scenario, variant: Variant) -> None:
    found = simulate(scenario, variant, seed=0, scale=0.1)
    assert found.live_share >= found.held_share >= 0.96


def test_the_same_seed_gives_the_same_figures() -> None:
    one, same, other = (simulate(PAPER_SHAREGPT, GPU, seed=seed, scale=0.04) for seed in (0, 0, 1))
    assert replace(one, elapsed_s=0) == replace(same, elapsed_s=0)
    assert one.live_share != other.live_share


def test_reserving_runs_fewer_sequences_on_more_memory() -> None:
    crowd = replace(PAPER_SHAREGPT, requests_per_s=100.0)
    found = [simulate(crowd, variant, seed=0, scale=0.1) for variant in (MAX, POW2, ORACLE, GPU)]
    shares = [usage.live_share for usage in found]
    batches = [usage.mean_batch for usage in found]
    assert shares == sorted(shares)
    assert batches == sorted(batches)
    assert batches[-1] > 2 * batches[-2]


def test_large_pages_of_a_layer_each_waste_more_than_blocks() -> None:
    per_layer = replace(GPU, options={**GPU.options, "kv_layout": "per-layer"})
    shares = [simulate(PAPER_SHAREGPT, v, seed=0, scale=0.04).live_share for v in (per_layer, PAGED, GPU)]
    assert shares == sorted(shares)
    assert shares[0] < 0.9


def test_a_crowd_waits_for_memory() -> None:
    crowd = replace(PAPER_SHAREGPT, requests_per_s=100.0)
    found = simulate(crowd, GPU, seed=0, scale=0.2)
    assert found.mean_waiting > 1
    assert found.max_batch >= found.mean_batch > 20
    assert found.limit_share > 0.8


def test_samples_share_their_prompt_in_smaller_pieces_than_blocks() -> None:
    virtual, paged = (simulate(PAPER_SHAREGPT, v, seed=0, n=2, scale=0.04).saved_share for v in (GPU, PAGED))
    assert 0.05 < paged <= virtual < 0.5
    assert simulate(PAPER_SHAREGPT, GPU, seed=0, scale=0.04).saved_share == 0


def test_requests_share_nothing_even_where_they_could() -> None:
    assert simulate(PAPER_SHAREGPT, with_prefix_cache(GPU), seed=0, scale=0.04).saved_share == 0


def test_preempted_samples_find_their_prompt_in_the_prefix_cache() -> None:
    tight = replace(PAPER_SHAREGPT, device=replace(A100_40, nbytes=31 * 2**30))
    plain, cached = (simulate(tight, v, seed=0, n=2, scale=0.04) for v in (GPU, with_prefix_cache(GPU)))
    assert min(plain.num_preemptions, cached.num_preemptions) > 0
    assert cached.saved_share > plain.saved_share


def test_lengths_of_running_sequences_are_seen() -> None:
    running = running_lengths(PAPER_SHAREGPT, GPU, seed=0, scale=0.04)
    assert running.counts.sum() > 100
    assert 1 <= running.lengths.min() <= running.lengths.max() <= 2048


def test_the_clock_follows_the_roofline_and_the_number_of_sequences() -> None:
    device = SimulatedDevice(OPT_13B, A100_40)
    assert len(device.predict([Chunk(0, 1000, [0], 1), Chunk(1, 0, [0], 1)])) == 2
    nbytes = 2 * OPT_13B.num_params + 1002 * OPT_13B.token_nbytes
    assert device.now_s == pytest.approx(nbytes / (A100_40.nbytes_per_s * EFFICIENCY) + 2 * SEQUENCE_S)
    before = device.now_s
    device.predict([Chunk(0, 0, [0] * 2000, 0)])
    compute_s = 2 * OPT_13B.num_params * 2000 / (A100_40.flops * EFFICIENCY)
    assert device.now_s - before == pytest.approx(compute_s + SEQUENCE_S)
    assert device.lengths == [2000]


def test_every_scenario_has_variants_of_its_own() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    for scenario in SCENARIOS:
        assert len({variant.name for variant in scenario.variants}) == len(scenario.variants) > 1
