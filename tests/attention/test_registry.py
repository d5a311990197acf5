from __future__ import annotations

import pytest
import torch

from tests.attention.cases import SPECS
from vattention.attention.registry import KERNELS, choose
from vattention.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_takes_the_first_that_can() -> None:
    assert choose("auto", SPECS["gqa"], torch.bfloat16, CPU).name == "sdpa"
    for name in ("softcap", "sinks"):
        assert choose("auto", SPECS[name], torch.bfloat16, CPU).name == "eager"


@pytest.mark.parametrize("name", KERNELS)
def test_a_named_kernel_is_taken(name: str) -> None:
    assert choose(name, SPECS["window"], torch.float32, CPU) is KERNELS[name]


def test_a_named_kernel_that_cannot_says_why_and_which_can() -> None:
    with pytest.raises(ConfigError, match=r"attention='sdpa' cannot .*soft-cap.*choose 'auto', 'eager'$"):
        choose("sdpa", SPECS["softcap"], torch.float32, CPU)
    with pytest.raises(ConfigError, match=r"sinks"):
        choose("sdpa", SPECS["sinks"], torch.float32, CPU)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"attention='flash' is not known; choose 'auto', 'sdpa', 'eager'"):
        choose("flash", SPECS["mha"], torch.float32, CPU)


def test_no_kernel_takes_integers() -> None:
    with pytest.raises(ConfigError, match=r"no attention kernel can .*int8"):
        choose("auto", SPECS["mha"], torch.int8, CPU)
