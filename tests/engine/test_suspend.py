"""Suspended and resumed, a conversation goes on as if nothing had been, whichever manager has it then and now."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests.engine.fakes import PAGE, SPECS, FakeRunner, completion, fake_engine
from tests.engine.test_parity import engine_for
from tests.engine.test_scheduler import greedy, run
from tests.kv.managers import paged
from tests.model.architectures import ARCHITECTURES
from vattention.engine.engine import LLMEngine
from vattention.errors import ContextLengthError, DriverError, RequestError
from vattention.kv.layout import plan
from vattention.kv.manager import KVManager
from vattention.kv.virtual import VirtualManager
from vattention.memory import open_driver
from vattention.sampling_params import SamplingParams

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]


def virtual(pages: int, *, sliced: bool = False, caching: bool = False) -> KVManager:
    layout = plan(SPECS, item_nbytes=4, num_slots=4, max_len=64, page_nbytes=PAGE, sliced=sliced)
    return VirtualManager(
        open_driver("cpu", PAGE),
        layout,
        dtype=torch.float32,
        limit_nbytes=pages * PAGE,
        prefix_cache=caching,
        background=False,
    )


MANAGERS: dict[str, Callable[[int], KVManager]] = {
    "virtual": virtual,
    "sliced": lambda pages: virtual(pages, sliced=True),
    "cached": lambda pages: virtual(pages, caching=True),
    "paged": lambda pages: paged(specs=SPECS, caching=True, limit_nbytes=pages * PAGE),
}
"""By name, each with so many pages."""

MANY = 1000


def started(manager: str = "virtual", *, steps: int, params: SamplingParams | None = None) -> LLMEngine:
    """An engine in the middle of request "a"."""
    engine = fake_engine(manager=MANAGERS[manager](MANY), max_num_batched_tokens=4)
    engine.add_request("a", {"prompt_token_ids": PROMPT}, params or greedy(20))
    for _ in range(steps):
        engine.step()
    return engine


def nothing_is_left(engine: LLMEngine) -> None:
    assert not engine.has_unfinished_requests()
    assert engine.statistics().num_running == engine.statistics().num_waiting == 0
    assert engine.manager.accounts().live_nbytes == 0
    engine.close()


@pytest.mark.parametrize("after", MANAGERS)
@pytest.mark.parametrize("before", MANAGERS)
def test_a_running_request_goes_on_in_another_engine(before: str, after: str, tmp_path: Path) -> None:
    engine = started(before, steps=9)
    engine.suspend("a", tmp_path / "a")
    nothing_is_left(engine)

    runner = FakeRunner()
    engine = fake_engine(manager=MANAGERS[after](MANY), runner=runner)
    output = engine.resume(tmp_path / "a", "b")
    assert not output.finished
    assert 0 < len(output.outputs[0].token_ids) < 20
    outputs = run(engine)
    assert outputs["b"].outputs[0].token_ids == completion(PROMPT, 20)
    assert runner.num_computed == 20 - len(output.outputs[0].token_ids), "nothing is computed twice"
    nothing_is_left(engine)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", range(7))
def test_at_any_step_with_any_number_of_samples(steps: int, n: int, tmp_path: Path) -> None:
    engine = started(steps=steps, params=greedy(6, n))
    engine.suspend("a", tmp_path / "a")
    nothing_is_left(engine)
    engine = fake_engine(num_slots=2)
    engine.resume(tmp_path / "a", "a")
    samples = run(engine)["a"].outputs
    assert [sample.token_ids for sample in samples] == [completion(PROMPT, 6)] * n
    nothing_is_left(engine)


def test_the_engine_goes_on_without_it(tmp_path: Path) -> None:
    engine = started(steps=5)
    engine.add_request("other", {"prompt_token_ids": [3]}, greedy(8))
    engine.step()
    engine.suspend("a", tmp_path / "a")
    assert run(engine)["other"].outputs[0].token_ids == completion([3], 8)
    engine.resume(tmp_path / "a", "a")
    assert run(engine)["a"].outputs[0].token_ids == completion(PROMPT, 20)
    with pytest.raises(RequestError, match="no request 'a' is running"):
        engine.suspend("a", tmp_path / "b")
    nothing_is_left(engine)


def test_a_resumed_request_that_is_aborted_leaves_nothing(tmp_path: Path) -> None:
    engine = started(steps=5)
    engine.suspend("a", tmp_path / "a")
    engine.resume(tmp_path / "a", "a")
    engine.abort("a")
    nothing_is_left(engine)


CACHING = ("cached", "paged")


@pytest.mark.parametrize("after", CACHING)
@pytest.mark.parametrize("before", CACHING)
def test_a_finished_conversation_computes_only_its_next_turn(before: str, after: str, tmp_path: Path) -> None:
    engine = started(before, steps=0)
    first = run(engine)["a"]
    engine.suspend_finished(first, tmp_path / "a")
    nothing_is_left(engine)

    runner = FakeRunner()
    engine = fake_engine(manager=MANAGERS[after](MANY), runner=runner)
    output = engine.resume(tmp_path / "a", "b")
    assert output.finished
    assert output.outputs == first.outputs
    assert output.prompt_token_ids == PROMPT
    turn = [*PROMPT, *output.outputs[0].token_ids, 20, 21]
    engine.add_request("next", {"prompt_token_ids": turn}, greedy(5))
    assert run(engine)["next"].outputs[0].token_ids == completion(turn, 5)
    # The last sampled token was never computed; with whole blocks of 4 the cache may lack up to 3 more. A window's
    # end may lie inside a block of another cache, which then cannot use it.
    assert 3 + 4 <= runner.num_computed <= (len(turn) + 4 if (before, after) == ("cached", "paged") else 3 + 3 + 4)
    nothing_is_left(engine)


@pytest.mark.parametrize("manager", CACHING)
@pytest.mark.parametrize("salts", [("x", "x"), ("x", "")])
def test_a_salt_keeps_a_conversation_apart(salts: tuple[str, str], manager: str, tmp_path: Path) -> None:
    engine = fake_engine(manager=MANAGERS[manager](MANY))
    engine.add_request("a", {"prompt_token_ids": PROMPT, "cache_salt": "x"}, greedy(20))
    engine.suspend_finished(run(engine)["a"], tmp_path / "a", cache_salt=salts[0])
    engine.close()
    engine = fake_engine(manager=MANAGERS[manager](MANY))
    output = engine.resume(tmp_path / "a", "b")
    turn = [*PROMPT, *output.outputs[0].token_ids, 20]
    engine.add_request("next", {"prompt_token_ids": turn, "cache_salt": salts[1]}, greedy(1))
    assert (run(engine)["next"].num_cached_tokens > 0) == (salts[0] == salts[1])
    engine.close()


def test_without_a_cache_a_finished_conversation_is_its_tokens(tmp_path: Path) -> None:
    engine = started(steps=0)
    first = run(engine)["a"]
    engine.suspend_finished(first, tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert list(file.keys()) == []
    assert engine.resume(tmp_path / "a", "b").outputs == first.outputs
    nothing_is_left(engine)


def test_samples_and_logprobs_of_a_model_are_those_without_a_break(tmp_path: Path) -> None:
    model = ARCHITECTURES["gemma3"]()
    params = SamplingParams(temperature=1.0, n=2, max_tokens=12, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    prompt: Any = {"prompt_token_ids": list(range(3, 40))}
    engine = engine_for(model, max_num_seqs=4)
    engine.add_request("whole", prompt, params)
    whole = run(engine)["whole"]
    engine.close()

    engine = engine_for(model, max_num_seqs=4)
    engine.add_request("a", prompt, params)
    for _ in range(6):
        engine.step()
    engine.suspend("a", tmp_path / "a")
    engine.close()
    engine = engine_for(model, max_num_seqs=4, kv_layout="sliced")
    engine.add_request("first", {"prompt_token_ids": [9]}, params)  # a seed drawn again would be another
    run(engine)
    engine.resume(tmp_path / "a", "a")
    broken = run(engine)["a"]
    assert [s.token_ids for s in broken.outputs] == [s.token_ids for s in whole.outputs]
    assert broken.prompt_logprobs == whole.prompt_logprobs
    for one, other in zip(broken.outputs, whole.outputs, strict=True):
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
        assert [list(entry) for entry in one.logprobs or ()] == [list(entry) for entry in other.logprobs or ()]
    engine.close()

    engine = engine_for(ARCHITECTURES["llama"](), max_num_seqs=4)
    with pytest.raises(RequestError, match="other weights"):
        engine.resume(tmp_path / "a", "a")
    assert not engine.has_unfinished_requests()
    engine.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    engine = started(steps=9)
    engine.suspend("a", tmp_path / "a")
    engine.close()
    return tmp_path / "a"


def refused(file: Path, message: str, kind: type[Exception] = RequestError) -> None:
    engine = fake_engine()
    with pytest.raises(kind, match=message):
        engine.resume(file, "a")
    nothing_is_left(engine)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_cut_file_is_refused(share: float, file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    refused(file, "cut short or damaged")


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_a_flipped_bit_is_noticed(place: float, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)
    refused(file, "damaged")


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "weights")
    refused(tmp_path / "weights", "holds no suspended conversation")
    refused(tmp_path / "nothing", "nothing", FileNotFoundError)


def test_other_versions_and_caches_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vattention.engine.suspend_file.VERSION", 2)
        refused(file, "version 1, and this program reads 2")
    with monkeypatch.context() as patch:
        patch.setattr("tests.engine.fakes.SPECS", [SPECS[0], replace(SPECS[1], window=5)])
        refused(file, "other types or shapes")


def test_a_shorter_context_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine()
    monkeypatch.setattr("vattention.engine.suspend.Parts.max_model_len", 15)
    with pytest.raises(ContextLengthError, match="context of 15 tokens"):
        engine.resume(file, "a")
    engine.close()


@pytest.mark.parametrize("fault", ["library", "disk", "folder"])
def test_a_failed_write_changes_nothing(fault: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("no space left") if fault == "library" else OSError(28, "no space left")

    engine = started(steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(f"vattention.engine.suspend_file.{'save_file' if fault == 'library' else 'os.replace'}", full)
        path = file if fault != "folder" else file.parent / "gone" / "a"
        with pytest.raises((OSError, DriverError), match=r"no space left|gone"):
            engine.suspend("a", path)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["a"]
    assert run(engine)["a"].outputs[0].token_ids == completion(PROMPT, 20)
    nothing_is_left(engine)


def test_the_file_is_plain_safetensors_with_a_json_record(file: Path) -> None:
    with safe_open(file, framework="pt") as content:
        record = json.loads(content.metadata()["vattention"])
        kept = record["images"]["0"]
        assert content.get_tensor("samples.0.layers.0.keys").shape == (kept, 1, 256)
        assert content.get_tensor("samples.0.layers.1.values").shape == (7, 1, 256), "what a window of 8 reads"
    assert record["request"]["prompt_token_ids"] == PROMPT
