"""Every driver call fails once, in every way: a request may end with an error, the engine goes on."""

from __future__ import annotations

import logging

import pytest

from tests.engine.fakes import PAGE, completion, fake_engine
from tests.engine.test_scheduler import run
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory import open_driver
from vattention.sampling_params import SamplingParams


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shortage", [False, True], ids=["refusal", "shortage"])
@pytest.mark.parametrize("half_way", [False, True], ids=["at once", "half way"])
@pytest.mark.parametrize("method", METHODS)
def test_one_failing_call(
    method: str, half_way: bool, shortage: bool, nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="vattention")
    driver = FaultyDriver(open_driver("cpu", PAGE))
    engine = fake_engine(num_slots=3, limit_pages=60, driver=driver)
    prompts = {str(i): [2 + i] * (3 + 2 * i) for i in range(8)}
    for name, prompt in prompts.items():
        engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=30))
    engine.step()
    driver.fail(method, nth, half_way=half_way, shortage=shortage and method in ("create", "map", "set_access"))
    outputs = run(engine)
    failed = [name for name, output in outputs.items() if output.outputs[0].finish_reason == "error"]
    assert len(failed) <= 1
    for name, prompt in prompts.items():
        if name in failed:
            assert isinstance(outputs[name].error, DriverError | OutOfMemoryError)
        else:
            assert outputs[name].outputs[0].token_ids == completion(prompt, 30)
    while driver._countdown:
        engine.manager.drop_warm()
        engine.add_request("more", {"prompt_token_ids": [2]}, SamplingParams(temperature=0, max_tokens=30))
        run(engine)
    engine.manager.drop_warm()
    assert engine.manager.accounts().mapped_nbytes == 0
    engine.close()
