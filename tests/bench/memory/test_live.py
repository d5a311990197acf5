from __future__ import annotations

from typing import Any

import pytest

from tests.model.tiny import tiny_folder
from vattention.bench.memory import live, live_sections
from vattention.bench.memory.live import live_beams, live_usage
from vattention.bench.memory.settings import Settings
from vattention.bench.memory.variants import HOST, LIVE, MAX_HOST, PAGED_HOST


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    # Tokens of 4 KiB, so that a block of 16 is more than a page.
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    return str(tiny_folder(folder, max_position_embeddings=512, vocab_size=1000, **sizes))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BEAM_TOKENS", 30)
    monkeypatch.setattr(live, "BEAM_PROMPTS", live.BEAM_PROMPTS[:1])


def test_serving_counts_what_holds_tokens(model: str) -> None:
    found = {v.name: live_usage(model, v, count=3, seed=0) for v in (HOST, MAX_HOST)}
    for meter, tokens_per_s in found.values():
        assert tokens_per_s > 0
        assert 1 <= meter.mean_batch <= meter.max_batch == 3
    assert found[HOST.name][0].live_share > 0.9
    assert 0 < found[MAX_HOST.name][0].live_share < 0.5


def test_beams_share_their_past(model: str) -> None:
    assert live_beams(model, HOST, 1) == 0
    pages, blocks = (live_beams(model, variant, 3) for variant in (HOST, PAGED_HOST))
    assert 0 < blocks < pages < 2 / 3


def test_the_section_has_every_manager(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_sections, "REPEATS", 1)
    monkeypatch.setattr(live_sections, "BEAM_WIDTHS", (2,))
    tables = {table.key: table for table in live_sections.live(Settings(model, scale=0.1))}
    assert [row["variant"] for row in tables["live"].to_json()] == [variant.name for variant in LIVE]
    assert [row["prefix_tokens"] for row in tables["live-prefix"].to_json()] == [80, 341]
    assert [row["variant"] for row in tables["live-beams"].to_json()] == [HOST.name, PAGED_HOST.name]
