from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.attention.cases import BATCHES, SPECS, filled, in_blocks
from tests.attention.subjects import SUBJECTS, empty_view
from vattention import native
from vattention.attention.registry import KERNELS, choose, runnable
from vattention.core import AttentionSpec
from vattention.errors import ConfigError
from vattention.kv.manager import CacheView, LayerView, PagedLayerView


def contiguous(spec: AttentionSpec, dtype: torch.dtype = torch.float32) -> LayerView:
    return filled(spec, BATCHES["one decode"], dtype)[1]


def blocks(spec: AttentionSpec) -> PagedLayerView:
    _, view, batch, _ = filled(spec, BATCHES["one decode"])
    return in_blocks(view, batch, spec, 16)


def view_for(name: str, spec: AttentionSpec) -> CacheView:
    return contiguous(spec) if KERNELS[name].reads is LayerView else blocks(spec)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattention.attention.compiled.kernels", lambda: None)


@pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels here")
def test_auto_takes_the_first_that_can() -> None:
    for name in ("gqa", "softcap", "sinks"):
        assert choose("auto", SPECS[name], contiguous(SPECS[name])).name == "native"
        assert choose("auto", SPECS[name], blocks(SPECS[name])).name == "paged"


@pytest.mark.usefixtures("no_library")
def test_without_the_library_auto_takes_torch() -> None:
    assert choose("auto", SPECS["gqa"], contiguous(SPECS["gqa"], torch.bfloat16)).name == "sdpa"
    for name in ("softcap", "sinks"):
        assert choose("auto", SPECS[name], contiguous(SPECS[name], torch.bfloat16)).name == "eager"
    assert choose("auto", SPECS["gqa"], blocks(SPECS["gqa"])).name == "gathered"
    with pytest.raises(ConfigError, match=r"attention='native' .* not built.*choose 'auto', 'sdpa', 'eager'$"):
        choose("native", SPECS["gqa"], contiguous(SPECS["gqa"]))


@pytest.mark.parametrize("name", [name for name in KERNELS if name in SUBJECTS])
def test_a_named_kernel_is_taken(name: str) -> None:
    assert choose(name, SPECS["window"], view_for(name, SPECS["window"])) is KERNELS[name]


@pytest.mark.usefixtures("no_library")
def test_a_named_kernel_that_cannot_says_why_and_which_can() -> None:
    with pytest.raises(ConfigError, match=r"attention='sdpa' cannot .*soft-cap.*choose 'auto', 'eager'$"):
        choose("sdpa", SPECS["softcap"], contiguous(SPECS["softcap"]))
    with pytest.raises(ConfigError, match=r"sinks"):
        choose("sdpa", SPECS["sinks"], contiguous(SPECS["sinks"]))


def test_a_kernel_for_another_kind_of_cache_is_refused() -> None:
    spec = SPECS["gqa"]
    with pytest.raises(ConfigError, match=r"'sdpa' .*reads contiguous .* has blocks; choose 'auto',.*'gathered'$"):
        choose("sdpa", spec, blocks(spec))
    with pytest.raises(ConfigError, match=r"'paged' .*reads blocks.* has contiguous .*choose 'auto',.*'eager'$"):
        choose("paged", spec, contiguous(spec))


@pytest.mark.usefixtures("no_library")
def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"attention='flash' is not known; choose 'auto', 'sdpa', 'eager'$"):
        choose("flash", SPECS["mha"], contiguous(SPECS["mha"]))
    with pytest.raises(ConfigError, match=r"attention='flash' is not known; choose 'auto', 'gathered'$"):
        choose("flash", SPECS["mha"], blocks(SPECS["mha"]))


def test_what_runs_here() -> None:
    here = runnable("cpu")
    assert [name for name in ("sdpa", "eager", "gathered") if name in here] == ["sdpa", "eager", "gathered"]
    assert not {"torch_flash", "flashinfer_paged", "triton"} & set(here)


def test_no_kernel_takes_integers() -> None:
    view = contiguous(SPECS["mha"])
    integers = replace(view, keys=view.keys.to(torch.int8), values=view.values.to(torch.int8))
    with pytest.raises(ConfigError, match=r"no attention kernel can .*native: .*not int8; .*int8"):
        choose("auto", SPECS["mha"], integers)


def test_the_compiled_kernel_runs_on_processors() -> None:
    reason = KERNELS["native"].unsupported(SPECS["mha"], empty_view(LayerView, SPECS["mha"], torch.float32, "meta"))
    assert reason is not None
    assert "meta" in reason
