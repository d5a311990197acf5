"""The part of the benchmark that serves a model on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from vattention.bench.memory import papers
from vattention.bench.memory.live import LIVE_LIMIT, live_beams, live_usage
from vattention.bench.memory.prefix import live_speed_ups
from vattention.bench.memory.settings import Settings
from vattention.bench.memory.tables import Column, Table, count, hundredths, percent, tenths
from vattention.bench.memory.variants import LIVE, SHARING_ON_A_HOST

REPEATS = 3
"""Pairs of runs with and without the prefix cache."""

BEAM_WIDTHS = (2, 4, 6)


def live(settings: Settings) -> Iterator[Table]:
    """The managers on a real model on this machine."""
    table = Table(
        "live",
        f"Live: {settings.model} on this machine, {LIVE_LIMIT} for keys and values",
        (
            Column("variant", "manager"),
            Column("live_share", "tokens in live memory", percent),
            Column("mapped_share", "in mapped memory, warm too", percent),
            Column("mean_batch", "running, mean", tenths),
            Column("max_batch", "max", count),
            Column("tokens_per_s", "tokens/s", tenths),
        ),
        note="Averages over real time, until the last request is done.",
    )
    for variant in LIVE:
        meter, tokens_per_s = live_usage(settings.model, variant, count=settings.count(24), seed=settings.seed)
        table.rows.append(
            (variant.name, meter.live_share, meter.held_share, meter.mean_batch, meter.max_batch, tokens_per_s)
        )
    yield table
    speed_up = Table(
        "live-prefix",
        f"Live: {settings.model} with a shared prefix, prefix cache over none",
        (
            Column("prefix_tokens", "tokens shared", count),
            Column("speed_up", "times faster, median", hundredths),
            Column("least", "least", hundredths),
            Column("most", "most", hundredths),
            Column("paper", "paper", hundredths),
        ),
        note="Runs with and without the cache in turns. The paper's figure is against Orca (Oracle) on a GPU.",
    )
    found = live_speed_ups(
        settings.model,
        list(papers.PREFIX_SPEED_UP),
        count=settings.count(24),
        repeats=REPEATS,
        seed=settings.seed,
    )
    speed_up.rows.extend((n, *found[n], paper) for n, paper in papers.PREFIX_SPEED_UP.items())
    yield speed_up
    beams = Table(
        "live-beams",
        f"Live: memory that {settings.model}'s beam searches save by sharing",
        (
            Column("variant", "manager"),
            *(Column(f"saved_{width}", f"{width} beams", percent) for width in BEAM_WIDTHS),
        ),
        note="Averages over forwards, real text, whatever the scale.",
    )
    for variant in SHARING_ON_A_HOST:
        beams.rows.append((variant.name, *(live_beams(settings.model, variant, width) for width in BEAM_WIDTHS)))
    yield beams
