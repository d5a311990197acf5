from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.cases import SPECS
from tests.attention.subjects import empty_view
from vattention.attention import flash_attention_4
from vattention.attention.flash_attention import (
    FlashAttention3Prompts,
    FlashAttentionKernel,
    FlashAttentionPagedKernel,
)
from vattention.attention.flash_attention_4 import FlashAttention4Prompts
from vattention.attention.flashinfer import FlashInferKernel, FlashInferPagedKernel
from vattention.attention.kernel import AttentionKernel
from vattention.attention.libraries import installed


def test_what_is_not_there() -> None:
    assert installed("no_such_package") is None


def test_what_cannot_be_imported_is_not_there_either_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "for_another_torch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert installed("for_another_torch") is None
        assert installed("for_another_torch") is None
    (said,) = caplog.messages
    assert "for_another_torch" in said
    assert "undefined symbol" in said


def test_version_4_is_not_there_where_version_2_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(flash_attention_4, "installed", installed.__wrapped__)
    assert flash_attention_4._fourth() is None


def never() -> Any:
    raise AssertionError("imported where it cannot run")


@pytest.mark.parametrize(
    "kernel",
    [
        FlashAttentionKernel(never),
        FlashAttention3Prompts(never),
        FlashAttention4Prompts(never),
        FlashAttentionPagedKernel(never, never),
        FlashInferKernel(never),
        FlashInferPagedKernel(never),
    ],
    ids=lambda kernel: type(kernel).__name__,
)
def test_nothing_is_imported_for_a_cache_it_cannot_read(kernel: AttentionKernel[Any]) -> None:
    reason = kernel.unsupported(SPECS["wide"], empty_view(kernel.reads, SPECS["wide"], torch.bfloat16))
    assert "on cpu" in str(reason)
