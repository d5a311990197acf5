"""`LLM` as a script that came from vLLM uses it."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests.model.tiny import tiny_folder
from vattention import (
    LLM,
    BeamSearchParams,
    CompletionOutput,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from vattention.config import EngineConfig
from vattention.errors import ConfigError, ContextLengthError, EngineStoppedError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_folder(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", max_num_seqs=4, kv_memory="64MiB") as made:
        yield made


def test_outputs_are_shaped_as_vllms_and_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["hello", "a longer prompt, to finish in another order", "x"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    for output in outputs:
        assert isinstance(output, RequestOutput)
        assert output.finished
        assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt or "")
        (sample,) = output.outputs
        assert isinstance(sample, CompletionOutput)
        assert len(sample.token_ids) == 6
        assert sample.finish_reason == "length"
        assert (
            sample.text
            == llm.get_tokenizer().decode([*output.prompt_token_ids, *sample.token_ids])[
                len(llm.get_tokenizer().decode(output.prompt_token_ids)) :
            ]
        )


def test_a_prompt_alone_and_token_ids_do_as_well(llm: LLM) -> None:
    (text,) = llm.generate("hello", GREEDY, use_tqdm=False)
    ids: Any = {"prompt_token_ids": text.prompt_token_ids}
    (tokens,) = llm.generate(ids, GREEDY, use_tqdm=False)
    assert tokens.prompt is None
    assert tokens.outputs[0].token_ids == text.outputs[0].token_ids
    assert (
        llm.generate({"prompt": "hello"}, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        == text.outputs[0].token_ids
    )


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5]
    with pytest.raises(RequestError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["a", "b"], params[:1], use_tqdm=False)


def test_samples_are_reproduced_by_seed_and_differ_without(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8, ignore_eos=True)
    first, second = (llm.generate("hello", seeded, use_tqdm=False)[0] for _ in range(2))
    assert [s.token_ids for s in first.outputs] == [s.token_ids for s in second.outputs]
    assert len({tuple(s.token_ids) for s in first.outputs}) == 3


def test_beam_search_is_shaped_as_vllms(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    prompts: list[Any] = ["hello", {"prompt_token_ids": tokenizer.encode("the lazy dog")}]
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    by_text, by_tokens = llm.beam_search(prompts, params)
    for output, prompt in ((by_text, "hello"), (by_tokens, "the lazy dog")):
        assert len(output.sequences) == 3
        scores = [beam.cum_logprob for beam in output.sequences]
        assert scores == sorted(scores, reverse=True)
        for beam in output.sequences:
            assert beam.tokens[:-6] == tokenizer.encode(prompt)
            assert beam.text == tokenizer.decode(beam.tokens, skip_special_tokens=True)
            assert [len(entry) for entry in beam.logprobs] == [6] * 6
            taken = zip(beam.tokens[-6:], beam.logprobs, strict=True)
            assert beam.cum_logprob == pytest.approx(sum(entry[token].logprob for token, entry in taken))
            assert (beam.finish_reason, beam.stop_reason) == ("length", None)
    (greedy,) = llm.generate("hello", GREEDY, use_tqdm=False)
    (narrow,) = llm.beam_search("hello", BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True))
    assert narrow.sequences[0].tokens == greedy.prompt_token_ids + greedy.outputs[0].token_ids


def test_a_stop_string_ends_a_beam(llm: LLM) -> None:
    free = SamplingParams(n=3, use_beam_search=True, max_tokens=8, ignore_eos=True)
    (unstopped,) = llm.generate("hello", free, use_tqdm=False)
    stop = unstopped.outputs[0].text[2:4]
    params = SamplingParams(n=3, use_beam_search=True, max_tokens=8, ignore_eos=True, stop=stop, length_penalty=0)
    (output,) = llm.generate("hello", params, use_tqdm=False)
    stopped = [sample for sample in output.outputs if sample.finish_reason == "stop"]
    assert stopped
    for sample in stopped:
        assert sample.stop_reason == stop
        assert stop not in sample.text
        assert stop in llm.get_tokenizer().decode([*output.prompt_token_ids, *sample.token_ids])


def test_more_beams_than_slots_stop_the_call_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="max_num_seqs"):
        llm.beam_search(["a", "b"], BeamSearchParams(beam_width=5, max_tokens=4))
    assert not llm.engine.has_unfinished_requests()


def test_an_invalid_prompt_stops_the_call_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        llm.generate(["fine", "x " * 5000], GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()


def test_chat_puts_the_conversation_through_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    one = llm.chat(conversation, GREEDY, use_tqdm=False)
    many = llm.chat([conversation, conversation], GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in many] == [one[0].prompt_token_ids] * 2
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    assert one[0].prompt_token_ids == tokenizer.apply_chat_template(conversation)


def test_a_chat_ends_where_the_model_goes_on_with_the_users_turn(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    (free,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    turn = free.outputs[0].text[1:3]
    monkeypatch.setattr(llm.engine.tokenizer, "chat_stop_strings", lambda template=None: (turn,))
    own = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop="no such text")
    for params in (GREEDY, [own]):
        (output,) = llm.chat(conversation, params, use_tqdm=False)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == (free.outputs[0].text[:1], turn)


def test_vllms_other_arguments_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0.9: .* kv_memory limits it"):
        LLM(str(folder), gpu_memory_utilization=0.9)
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: a model runs on one device"):
        LLM(str(folder), tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="no argument 'kv_memmory'"):
        LLM(str(folder), kv_memmory="1GiB")


def test_vllms_arguments_that_ask_for_nothing_are_let_through(folder: Path) -> None:
    idle: dict[str, Any] = {"tensor_parallel_size": 1, "disable_log_stats": True, "revision": None, "seed": None}
    with LLM(str(folder), kv_memory="64MiB", quantization=None, **idle) as llm:
        assert llm.engine.config == EngineConfig(model=str(folder), kv_memory="64MiB")


def test_prompts_as_token_ids_alone(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    (expected,) = llm.generate("hello", GREEDY, use_tqdm=False)
    many: list[Any] = [ids, [ids], [np.array(ids)], {"prompt_token_ids": torch.tensor(ids)}, (tuple(ids), "hello")]
    for prompts in many:
        for output in llm.generate(prompts, GREEDY, use_tqdm=False):
            assert output.prompt_token_ids == ids
            assert all(type(token) is int for token in output.prompt_token_ids)
            assert output.outputs == expected.outputs


@pytest.mark.parametrize("prompts", [None, 5, [None], b"hello", [["a"]], [{"text": "a"}], "\ud800", [[True]]])
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert refusal.value.param == "prompt"


def test_bad_words_and_allowed_tokens(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    (free,) = llm.generate("hello", GREEDY, use_tqdm=False)
    pair = free.outputs[0].token_ids[1:3]
    params = GREEDY.clone()
    params.bad_words = [tokenizer.decode(pair)]
    assert tokenizer.encode(params.bad_words[0], add_special_tokens=False) == pair
    (other,) = llm.generate("hello", params, use_tqdm=False)
    assert other.outputs[0].token_ids[:2] == free.outputs[0].token_ids[:2]
    assert other.outputs[0].token_ids[2] != pair[1]
    allowed = SamplingParams(max_tokens=20, seed=1, allowed_token_ids=[40, 50, 60])
    (few,) = llm.generate("hello", allowed, use_tqdm=False)
    assert set(few.outputs[0].token_ids) == {40, 50, 60}


def test_structured_outputs_are_what_they_have_to_be(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    kinds: list[dict[str, Any]] = [
        {"json": {**schema, "additionalProperties": False}},
        {"choice": ["good", "bad"]},
        {"regex": r"[0-9]{3}/x"},
    ]
    params = [
        SamplingParams(max_tokens=60, seed=seed, structured_outputs=StructuredOutputsParams(**kind))
        for kind in kinds
        for seed in range(3)
    ]
    texts = [output.outputs[0].text for output in llm.generate(["hello"] * 9, params, use_tqdm=False)]
    assert all(json.loads(text) in ({"a": True}, {"a": False}) for text in texts[:3])
    assert set(texts[3:6]) <= {"good", "bad"}
    assert all(re.fullmatch("[0-9]{3}/x", text) for text in texts[6:])


def test_what_comes_with_a_prompt_is_not_lost_silently(llm: LLM) -> None:
    idle: Any = {"prompt": "hello", "multi_modal_data": None, "mm_processor_kwargs": {}}
    assert llm.generate(idle, GREEDY, use_tqdm=False)[0].finished
    for name in ("multi_modal_data", "cache_sallt"):
        with pytest.raises(RequestError, match=f"'{name}' would be lost"):
            llm.generate(idle | {name: "anything"}, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("params", [{"max_tokens": 1}, [None], ["a"]])
def test_what_are_no_sampling_params_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="must be SamplingParams"):
        llm.generate(["hello"], params, use_tqdm=False)


def test_sampling_params_may_be_changed_and_are_checked_again(llm: LLM) -> None:
    params = llm.get_default_sampling_params()
    params.max_tokens, params.temperature = 3, 0.0
    other = params.clone()
    other.max_tokens = 5
    outputs = llm.generate(["hello"] * 2, [params, other], use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 5]
    params.top_p = 2.0
    with pytest.raises(RequestError, match="top_p must be"):
        llm.generate("hello", params, use_tqdm=False)


def test_the_tokenizer_is_transformers(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer.batch_decode([tokenizer("hello").input_ids], skip_special_tokens=True) == ["hello"]
    talk = [{"role": "user", "content": "hello"}]
    template = "{{ messages[0].content }}{% if more %} {{ more }}{% endif %}"
    assert tokenizer.apply_chat_template(talk, tokenize=False, chat_template=template) == "hello"
    more: dict[str, Any] = {"chat_template": template, "chat_template_kwargs": {"more": "there"}}
    (output,) = llm.chat(talk, GREEDY, False, **more)
    assert tokenizer.decode(output.prompt_token_ids) == "hello there"
    with pytest.raises(RequestError, match="messages are mappings"):
        llm.chat("hello")  # type: ignore[arg-type]


def test_token_ids_only_without_a_tokenizer(folder: Path) -> None:
    with LLM(str(folder), skip_tokenizer_init=True, kv_memory="64MiB") as llm:
        ids: Any = {"prompt_token_ids": [5, 6, 7]}
        (output,) = llm.generate(ids, GREEDY, use_tqdm=False)
        assert output.outputs[0].text == ""
        assert len(output.outputs[0].token_ids) == 6
        with pytest.raises(ConfigError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


def test_the_last_reference_takes_the_memory_with_it(folder: Path) -> None:
    llm = LLM(str(folder), kv_memory="64MiB")
    llm.generate("hello", GREEDY, use_tqdm=False)
    maps = Path("/proc/self/maps")
    before = maps.read_text().count("memfd:vattention")
    del llm
    gc.collect()
    assert maps.read_text().count("memfd:vattention") == before - 1


def test_calls_from_several_threads_take_turns(llm: LLM) -> None:
    prompts = ["hello", "the lazy dog", "x", "naïve"]
    expected = [output.outputs for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    found: dict[int, Any] = {}

    def call(index: int) -> None:
        found[index] = [llm.generate(prompts[index], GREEDY, use_tqdm=False)[0].outputs for _ in range(4)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [outputs] * 4 for index, outputs in enumerate(expected)}


def test_ctrl_c_waits_for_the_step_and_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, whole = llm.engine.step, []

    def interrupted() -> list[RequestOutput]:
        os.kill(os.getpid(), signal.SIGINT)
        whole.append(step())
        return whole[-1]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["hello"] * 9, GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert len(whole) == 1
    assert signal.getsignal(signal.SIGINT) is before
    now = llm.engine.statistics()
    assert now.num_running == now.num_waiting == now.accounts.live_nbytes == 0
    assert len(llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


def test_a_forked_process_is_told_to_load_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("hello", GREEDY, use_tqdm=False)
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: 1)
        with pytest.raises(EngineStoppedError, match=r"was forked; .*'spawn'"):
            llm.generate("hello", GREEDY, use_tqdm=False)
        llm.engine.close()
    assert [output.outputs for output in llm.generate("hello", GREEDY, use_tqdm=False)] == [
        output.outputs for output in expected
    ]


def test_nothing_works_after_the_end(folder: Path, tmp_path: Path) -> None:
    llm = LLM(str(folder), kv_memory="64MiB")
    (output,) = llm.generate("hello", GREEDY, use_tqdm=False)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate("hello", GREEDY, use_tqdm=False),
        lambda: llm.suspend(output, tmp_path / "file"),
        lambda: llm.resume(tmp_path / "file"),
    ):
        with pytest.raises(EngineStoppedError, match="has been closed"):
            use()


def test_an_llm_cannot_be_copied(llm: LLM) -> None:
    uses: tuple[Callable[[LLM], object], ...] = (pickle.dumps, copy.deepcopy)
    for use in uses:
        with pytest.raises(TypeError, match="load the model in each process"):
            use(llm)


def test_a_former_model_goes_before_the_next_one_comes(folder: Path) -> None:
    former: list[Any] = [torch.nn.Linear(1, 1)]
    former.append(former)
    gc.collect()  # it is old, so that nothing but a full search finds it
    gone = weakref.ref(former[0])
    del former
    with LLM(str(folder), dtype="float32", max_num_seqs=4, kv_memory="64MiB"):
        assert gone() is None


def test_a_conversation_on_disk_outlives_its_llm(folder: Path, tmp_path: Path) -> None:
    with LLM(str(folder), dtype="float32", kv_memory="64MiB") as llm:
        params = SamplingParams(temperature=1.0, max_tokens=8, stop=["zz"], min_tokens=8)
        (whole,) = llm.generate("hello there", params, use_tqdm=False)
        llm.suspend(whole, tmp_path / "finished")
    with LLM(str(folder), dtype="float32", kv_memory="64MiB") as llm:
        llm.engine.add_request("mine", "hello there", params)
        for _ in range(4):
            llm.engine.step()
        llm.suspend("mine", tmp_path / "running")
    with LLM(str(folder), dtype="float32", kv_memory="64MiB", kv_layout="sliced", seed=5) as llm:
        for name in ("finished", "running"):
            output = llm.resume(tmp_path / name, use_tqdm=False)
            assert output.finished
            assert (output.prompt, output.prompt_token_ids) == (whole.prompt, whole.prompt_token_ids)
            assert output.outputs == whole.outputs


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_whoever_manages_the_memory(
    folder: Path, quantization: Literal["int8", "int4"], tmp_path: Path
) -> None:
    prompts = ["hello", "a longer prompt, to share", "a longer prompt, to share and to go on from"]
    texts = []
    for kv in ("virtual", "paged", "reserved"):
        options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 2, "kv_memory": "64MiB", "kv": kv}
        with LLM(str(folder), quantization=quantization, **options) as quantized:
            first = quantized.generate(prompts, GREEDY, use_tqdm=False)
            again = quantized.generate(prompts[::-1], GREEDY, use_tqdm=False)[::-1]
            texts += [[output.outputs[0].token_ids for output in outputs] for outputs in (first, again)]
            path = tmp_path / kv
            quantized.suspend(first[1], path)
    assert texts == texts[:1] * 6
    with LLM(str(folder), dtype="float32", kv_memory="64MiB") as whole, pytest.raises(RequestError, match="model"):
        whole.resume(path)
