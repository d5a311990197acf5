from __future__ import annotations

import pytest

from vattention.bench.memory.shapes import (
    A100_40,
    A100_80,
    GEMMA_3_270M,
    LLAMA_3_8B,
    OPT_13B,
    YI_34B,
    kv_nbytes,
)
from vattention.errors import ConfigError


def test_tokens_have_their_published_sizes() -> None:
    assert OPT_13B.token_nbytes == 800 * 1024  # PagedAttention, section 3
    assert LLAMA_3_8B.token_nbytes == 128 * 1024
    assert len(YI_34B.specs) == 60


def test_opt_13b_has_room_for_the_papers_number_of_tokens() -> None:
    assert kv_nbytes(OPT_13B, A100_40) / OPT_13B.token_nbytes == pytest.approx(15_700, rel=0.02)  # table 1


def test_windows_alternate_as_in_gemma() -> None:
    windows = [spec.window for spec in GEMMA_3_270M.specs]
    assert windows == [512, 512, 512, 512, 512, None] * 3


def test_weights_that_do_not_fit_are_an_error() -> None:
    assert kv_nbytes(YI_34B, A100_80) > 0
    with pytest.raises(ConfigError, match="choose a larger device"):
        kv_nbytes(YI_34B, A100_40)
