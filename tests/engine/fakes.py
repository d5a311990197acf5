"""An engine without a model: each next token is a hash of all tokens before it, so every mistake shows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from vattention.config import EngineConfig
from vattention.core import AttentionSpec, Chunk
from vattention.engine.engine import LLMEngine
from vattention.engine.parts import Parts
from vattention.kv.layout import plan
from vattention.kv.manager import KVManager
from vattention.kv.virtual import VirtualManager
from vattention.memory import open_driver
from vattention.memory.driver import Driver

VOCAB = 50
END = 1
PAGE = 4096
SPECS = [
    AttentionSpec(1, 1, 256, 256, 1.0),  # 1 KiB per token and plane: 4 tokens a page
    AttentionSpec(1, 1, 256, 256, 1.0, window=8),
]


def next_token(context: Sequence[int]) -> int:
    """What the fake model says after `context`; never the end token."""
    return 2 + zlib.crc32(bytes(context)) % (VOCAB - 2)


def completion(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeRunner:
    """Keeps what was written to each slot, and computes from nothing else, as a real cache would.

    Args:
        fail_at: the number of a forward call that raises.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.written: dict[int, list[int]] = {}
        self.num_forwards = 0
        self.fail_at = fail_at
        self.closed = False

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.num_forwards += 1
        if self.num_forwards == self.fail_at:
            raise RuntimeError("injected failure in the forward pass")
        rows = []
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            held = self.written.setdefault(chunk.slot, [])
            assert chunk.start <= len(held) or chunk.start == 0
            held[chunk.start :] = chunk.token_ids
            for position in range(chunk.end - chunk.num_logits, chunk.end):
                row = torch.zeros(VOCAB)
                row[next_token(held[: position + 1])] = 9.0
                rows.append(row)
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def close(self) -> None:
        self.closed = True


def fake_manager(num_slots: int, limit_pages: int, driver: Driver | None = None) -> KVManager:
    driver = driver or open_driver("meta", PAGE)
    layout = plan(
        SPECS, item_nbytes=4, num_slots=num_slots, max_len=64, page_nbytes=driver.page_nbytes, sliced=False
    )
    return VirtualManager(driver, layout, dtype=torch.float32, limit_nbytes=limit_pages * PAGE, background=False)


def fake_engine(
    *,
    num_slots: int = 4,
    limit_pages: int = 1000,
    max_num_batched_tokens: int = 16,
    max_queue: int = 1000,
    runner: FakeRunner | None = None,
    driver: Driver | None = None,
) -> LLMEngine:
    config = EngineConfig(
        model="fake",
        max_num_seqs=num_slots,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue,
        kv_memory=limit_pages * PAGE,
    )
    parts = Parts(
        name="fake",
        manager=fake_manager(num_slots, limit_pages, driver),
        runner=runner or FakeRunner(),  # type: ignore[arg-type]  # the two methods an engine calls
        tokenizer=None,
        vocab_size=VOCAB,
        max_model_len=64,
        end_token_ids=frozenset({END}),
        default_sampling={},
    )
    return LLMEngine(config, parts)
