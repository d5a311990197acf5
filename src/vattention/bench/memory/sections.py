"""The benchmark's parts, each a few tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tqdm import tqdm

from vattention.bench.memory import papers
from vattention.bench.memory.beams import search
from vattention.bench.memory.device import SimulatedDevice
from vattention.bench.memory.live_sections import live
from vattention.bench.memory.meter import Meter
from vattention.bench.memory.pages import (
    BLOCK_SIZES,
    KIB,
    PAGE_NBYTES,
    block_share,
    layout_of,
    page_share,
    worst_nbytes,
)
from vattention.bench.memory.prefix import simulated_s, with_prefix_cache
from vattention.bench.memory.scenarios import (
    ON_HOST,
    PAPER_ALPACA,
    PAPER_PREFIX,
    PAPER_SHAREGPT,
    SCENARIOS,
    SHARING,
    Scenario,
)
from vattention.bench.memory.settings import Settings
from vattention.bench.memory.shapes import LLAMA_3_8B, OPT_13B, YI_6B, YI_34B
from vattention.bench.memory.simulate import running_lengths, simulate, simulated_engine
from vattention.bench.memory.tables import Column, Table, count, hundredths, percent, tenths
from vattention.bench.memory.variants import GPU, ORACLE, SHARING_ON_A_GPU, Variant

WIDTHS = (2, 4, 6)
"""Samples, and beams, per request."""

SAMPLED = 1 / 3
"""Of a scenario's requests, where each has several samples."""

BEAM_REQUESTS = 10
"""Beam searches per width; each is some hundred steps."""


def usage(settings: Settings) -> Iterator[Table]:
    """How much of the memory holds tokens, and how many sequences it lets run together."""
    table = Table(
        "usage",
        "Share of KV memory that holds tokens, and sequences batched",
        (
            Column("scenario", "load"),
            Column("variant", "manager"),
            Column("live_share", "tokens in live memory", percent),
            Column("held_share", "in mapped memory, without warm", percent),
            Column("limit_share", "in all KV memory", percent),
            Column("paper_share", "paper", percent),
            Column("mean_batch", "batched, mean", tenths),
            Column("max_batch", "max", count),
            Column("paper_batch", "paper, mean", tenths),
            Column("mean_waiting", "waiting, mean", tenths),
            Column("num_preemptions", "preempted", count),
        ),
        note="Live memory is what running sequences cannot do without; mapped memory without warm is all that "
        "stays mapped once warm memory is dropped, with the pages of the next forward mapped ahead. Averages over "
        "simulated time.",
    )
    pairs = [(scenario, variant) for scenario in SCENARIOS for variant in scenario.variants]
    for scenario, variant in tqdm(pairs, desc="loads and managers", leave=False, disable=None):
        found = simulate(scenario, variant, seed=settings.seed, scale=settings.scale)
        paper = variant.paper if scenario in (PAPER_SHAREGPT, PAPER_ALPACA) else None
        table.rows.append(
            (
                found.scenario,
                found.variant,
                found.live_share,
                found.held_share,
                found.limit_share,
                papers.TOKEN_SHARE[paper] if paper and scenario is PAPER_SHAREGPT else None,
                found.mean_batch,
                found.max_batch,
                papers.BATCHED[scenario.dataset.name][paper] if paper else None,
                found.mean_waiting,
                found.num_preemptions,
            )
        )
    yield table


def pages(settings: Settings) -> Iterator[Table]:
    """Internal fragmentation by page size and layout, and by block size."""
    models = (OPT_13B, LLAMA_3_8B, YI_34B)
    running = running_lengths(PAPER_SHAREGPT, GPU, seed=settings.seed, scale=settings.scale)
    table = Table(
        "pages",
        "Tokens in mapped memory by page size and layout, ShareGPT-like lengths",
        (
            Column("page_kib", "page, KiB", count),
            Column("layout", "layout"),
            *(Column(f"share_{model.name}", model.name, percent) for model in models),
            *(Column(f"ahead_{model.name}", f"{model.name}, one token ahead", percent) for model in models),
            *(Column(f"tokens_{model.name}", f"tokens a page, {model.name}", hundredths) for model in models),
        ),
        note="Each length counts as often as it was running in the simulation. One token ahead: with the memory "
        "that is mapped for the next forward during this one.",
    )
    for nbytes in PAGE_NBYTES:
        for name, sliced in (("per-layer", False), ("sliced", True)):
            layouts = [layout_of(model, nbytes, sliced=sliced) for model in models]
            widest = [max(plane.token_nbytes for plane in layout.groups[0].planes) for layout in layouts]
            table.rows.append(
                (
                    nbytes // KIB,
                    name,
                    *(page_share(running, layout) for layout in layouts),
                    *(page_share(running, layout, ahead=1) for layout in layouts),
                    *(nbytes / width for width in widest),
                )
            )
    yield table
    blocks = Table(
        "blocks",
        "Tokens in blocks by block size, ShareGPT-like lengths",
        (Column("block_size", "tokens a block", count), Column("share", "tokens in blocks", percent)),
    )
    blocks.rows.extend((size, block_share(running, size)) for size in BLOCK_SIZES)
    yield blocks
    yield _worst()


def _worst() -> Table:
    """vAttention's table: block size and the most that a sequence can waste (section 7.4)."""
    table = Table(
        "worst",
        "Tokens a page, and the most that one sequence can waste, per-layer as in vAttention's paper",
        (
            Column("model", "model"),
            Column("tensor_parallel", "GPUs", count),
            *(Column(f"tokens_{k}", f"tokens, {k} KiB", count) for k in (64, 128, 256, 2048)),
            *(Column(f"waste_mib_{k}", f"MiB wasted at most, {k} KiB", tenths) for k in (64, 128, 256, 2048)),
        ),
        note="Over all GPUs together. The paper (section 7.4) has 32 to 128 tokens and 4 to 15 MB at 64 KB, and 16 "
        "to 60 MB at 256 KB.",
    )
    for model in (YI_6B, LLAMA_3_8B, YI_34B):
        for gpus in (1, 2):
            shard = replace(model, num_heads=model.num_heads // gpus, num_kv_heads=model.num_kv_heads // gpus)
            layouts = [layout_of(shard, k * KIB, sliced=False) for k in (64, 128, 256, 2048)]
            table.rows.append(
                (
                    model.name,
                    gpus,
                    *(layout.groups[0].step for layout in layouts),
                    *(gpus * worst_nbytes(layout) / 2**20 for layout in layouts),
                )
            )
    return table


def sharing(settings: Settings) -> Iterator[Table]:
    """Memory that samples of one prompt save by sharing it, and beams by sharing their past."""
    yield _saved(
        "parallel",
        "Memory saved by sharing: parallel sampling",
        "samples",
        papers.PARALLEL_SAVED,
        lambda scenario, variant, n: (
            simulate(
                scenario, with_prefix_cache(variant), seed=settings.seed, n=n, scale=settings.scale * SAMPLED
            ).saved_share
        ),
        note="Through the engine: samples fork from one computed prompt, and one that was preempted finds it again "
        "in the prefix cache. Requests share nothing with each other, and come n times as seldom.",
    )
    yield _saved(
        "beams",
        "Memory saved by sharing: beam search",
        "beams",
        papers.BEAM_SAVED,
        lambda scenario, variant, width: _beams(scenario, variant, width, settings),
        note="Forks and releases of the manager along a random beam tree: savings depend on the tree alone.",
    )


def _saved(
    key: str,
    title: str,
    unit: str,
    paper: dict[str, dict[int, float]],
    measure: Callable[[Scenario, Variant, int], float],
    note: str,
) -> Table:
    table = Table(
        key,
        title,
        (
            Column("dataset", "lengths"),
            Column("variant", "manager"),
            *(Column(f"saved_{n}", f"{n} {unit}", percent) for n in WIDTHS),
            *(Column(f"paper_{n}", f"paper, {n}", percent) for n in WIDTHS),
        ),
        note=note,
    )
    pairs = [(scenario, variant) for scenario, variants in SHARING for variant in variants]
    for scenario, variant in tqdm(pairs, desc=unit, leave=False, disable=None):
        figures = paper[scenario.dataset.name] if scenario is not ON_HOST and variant.paper else {}
        table.rows.append(
            (
                f"{scenario.dataset.name}, {scenario.model.name}",
                variant.name,
                *(measure(scenario, variant, n) for n in WIDTHS),
                *(figures.get(n) for n in WIDTHS),
            )
        )
    return table


def _beams(scenario: Scenario, variant: Variant, width: int, settings: Settings) -> float:
    meter = Meter()
    trace = scenario.trace(settings.seed, scale=BEAM_REQUESTS * settings.scale / scenario.num_requests)
    device = SimulatedDevice(scenario.model, scenario.device)
    with simulated_engine(scenario, variant, device) as (_, manager):
        search(manager.as_manager, trace, width, settings.seed, meter)
    return meter.saved_share


def prefix(settings: Settings) -> Iterator[Table]:
    """What a shared prefix is worth on a simulated GPU, as in PagedAttention's figure 16."""
    variants = [variant for base in SHARING_ON_A_GPU for variant in (base, with_prefix_cache(base))] + [ORACLE]
    table = Table(
        "prefix",
        f"Throughput with a shared prefix, {PAPER_PREFIX.model.name} on {PAPER_PREFIX.device.name}, simulated",
        (
            Column("prefix_tokens", "tokens shared", count),
            *(Column(f"requests_per_s_{v.name}", f"{v.name}, requests/s", hundredths) for v in variants),
            Column("speed_up", "virtual, with cache over without", hundredths),
            Column("over_oracle", "over oracle", hundredths),
            Column("paper", "paper, over oracle", hundredths),
        ),
        note="Orca (Oracle), with which the paper compares, reserves memory besides sharing nothing.",
    )
    scenario = replace(PAPER_PREFIX, num_requests=settings.count(PAPER_PREFIX.num_requests))
    for num_tokens, paper in papers.PREFIX_SPEED_UP.items():
        rates = [scenario.num_requests / simulated_s(scenario, v, num_tokens, settings.seed) for v in variants]
        table.rows.append((num_tokens, *rates, rates[1] / rates[0], rates[1] / rates[-1], paper))
    yield table


SECTIONS: dict[str, Callable[[Settings], Iterator[Table]]] = {
    "usage": usage,
    "pages": pages,
    "sharing": sharing,
    "prefix": prefix,
    "live": live,
}
"""By the names that the command line knows them."""
