"""What is counted of the memory of weights."""

from __future__ import annotations

import torch
from torch import nn

from vattention.model.optimize_report import Account


def test_originals_that_others_hold_are_not_freed() -> None:
    first, second = nn.Linear(10, 10, bias=False), nn.Linear(10, 20, bias=False)
    tied = nn.Linear(10, 10, bias=False)
    tied.weight = first.weight
    model = nn.Sequential(first, second, tied)
    account = Account(model)
    account.pack([second.weight], 500, merged_nbytes=200)
    model[1] = nn.Identity()
    account.pack([first.weight], 400)
    report = account.report(1.0)
    assert (report.copied_nbytes, report.peak_copied_nbytes) == (400, 700)
    assert report.nbytes == 500 + 400 + 400


def test_a_screen_is_memory_beyond_the_weights() -> None:
    account = Account(nn.Sequential(nn.Linear(4, 4, bias=False)).requires_grad_(False).to(torch.bfloat16))
    before = account.report(1.0)
    report = before.with_screen(1000)
    assert (before.nbytes, before.screen_nbytes) == (32, 0)
    assert (report.nbytes, report.screen_nbytes) == (1032, 1000)
    assert report.copied_nbytes == report.peak_copied_nbytes == 1000
    assert before.with_screen(0) == before
