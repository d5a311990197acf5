"""An engine without a model: each next token is a hash of all tokens before it, so every mistake shows."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence

import torch

from vattention.config import EngineConfig
from vattention.core import AttentionSpec, Chunk
from vattention.engine.engine import LLMEngine
from vattention.engine.parts import Parts
from vattention.kv.layout import plan
from vattention.kv.manager import CacheView, KVManager, PagedLayerView
from vattention.kv.swap import SwapSpace
from vattention.kv.virtual import VirtualManager
from vattention.memory import open_driver
from vattention.memory.driver import Driver
from vattention.model.predictions import GivenLogits, Predictions

VOCAB = 50
END = 1
PAGE = 4096
WINDOW = 8
SPECS = [
    AttentionSpec(1, 1, 256, 256, 1.0),  # 1 KiB per token and plane: 4 tokens a page
    AttentionSpec(1, 1, 256, 256, 1.0, window=WINDOW),
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
    """Writes tokens to the cache's memory in the place of keys and values, and computes from what it reads there.

    So a page that is missing, stale or somebody else's gives a wrong token. The second layer has a window, and must
    hold the same tokens as far as that reaches.

    Args:
        fail_at: the number of a forward call that raises.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.manager: KVManager | None = None
        self.num_forwards = 0
        self.num_computed = 0
        self.fail_at = fail_at
        self.closed = False

    def predict(self, chunks: Sequence[Chunk]) -> Predictions:
        return GivenLogits(self.forward(chunks))

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        assert self.manager is not None
        self.num_forwards += 1
        if self.num_forwards == self.fail_at:
            raise RuntimeError("injected failure in the forward pass")
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        everything, windowed = self.manager.layer(0), self.manager.layer(1)
        for chunk in chunks:
            self.num_computed += len(chunk.token_ids)
            positions = torch.arange(chunk.start, chunk.end)
            slots = torch.full_like(positions, chunk.slot)
            marks = torch.tensor(chunk.token_ids, dtype=torch.float32).view(-1, 1, 1).expand(-1, 1, 256)
            everything.append(marks, -marks, slots, positions)
            windowed.append(marks, -marks, slots, positions)
        rows = []
        for chunk in chunks:
            context = read_tokens(everything, chunk.slot, 0, chunk.end)
            seen = max(0, chunk.start - WINDOW + 1)
            assert read_tokens(windowed, chunk.slot, seen, chunk.end) == context[seen:]
            rows += [self.logits(context[:end]) for end in range(chunk.end - chunk.num_logits + 1, chunk.end + 1)]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def logits(self, context: Sequence[int]) -> torch.Tensor:
        """[VOCAB], the next token's."""
        row = torch.zeros(VOCAB)
        row[next_token(context)] = 9.0
        return row

    def close(self) -> None:
        self.closed = True


class SteppedRunner(FakeRunner):
    """Computes only as many forward passes as it is given: `steps.release(count)`.

    Attributes:
        num_begun: forward passes asked for so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = threading.Semaphore(0)
        self.num_begun = 0

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.num_begun += 1
        self.steps.acquire()
        return super().forward(chunks)

    def run_free(self) -> None:
        self.steps.release(10_000)


def read_tokens(view: CacheView, slot: int, start: int, end: int) -> list[int]:
    """Tokens [start, end) of a slot, as `FakeRunner` wrote them."""
    positions = torch.arange(start, end)
    if isinstance(view, PagedLayerView):
        blocks = view.tables[slot, positions // view.block_size].long()
        keys, values = (t[blocks, positions % view.block_size] for t in (view.keys, view.values))
    else:
        keys, values = view.keys[slot, start:end], view.values[slot, start:end]
    assert torch.equal(keys, -values)
    tokens: list[int] = keys[:, 0, -1].int().tolist()
    return tokens


def fake_manager(
    num_slots: int, limit_pages: int, driver: Driver | None = None, *, prefix_cache: bool = True
) -> KVManager:
    driver = driver or open_driver("cpu", PAGE)
    layout = plan(
        SPECS, item_nbytes=4, num_slots=2 * num_slots, max_len=64, page_nbytes=driver.page_nbytes, sliced=False
    )
    return VirtualManager(
        driver,
        layout,
        dtype=torch.float32,
        limit_nbytes=limit_pages * PAGE,
        num_slots=num_slots,
        prefix_cache=prefix_cache,
        background=False,
    )


def fake_engine(
    *,
    manager: KVManager | None = None,
    num_slots: int = 4,
    limit_pages: int = 1000,
    max_num_batched_tokens: int = 16,
    max_queue: int = 1000,
    runner: FakeRunner | None = None,
    driver: Driver | None = None,
    swap_space: SwapSpace | None = None,
    prefix_cache: bool = True,
) -> LLMEngine:
    config = EngineConfig(
        model="fake",
        max_num_seqs=num_slots,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue,
        kv_memory=limit_pages * PAGE,
        enable_prefix_caching=prefix_cache,
    )
    runner = runner or FakeRunner()
    runner.manager = manager or fake_manager(num_slots, limit_pages, driver, prefix_cache=prefix_cache)
    parts = Parts(
        name="fake",
        manager=runner.manager,
        runner=runner,  # type: ignore[arg-type]  # the two methods an engine calls
        tokenizer=None,
        vocab_size=VOCAB,
        max_model_len=64,
        end_token_ids=frozenset({END}),
        default_sampling={},
        cache_specs=SPECS,
        fingerprint="fake",
        swap_space=swap_space,
    )
    return LLMEngine(config, parts)
