from __future__ import annotations

import json
import os
import sys

import pytest

from vattention.cli import info
from vattention.cli.main import main
from vattention.errors import ConfigError


def test_json_says_what_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert 0 < facts["memory"]["free_nbytes"] < facts["memory"]["total_nbytes"]
    assert facts["memory"]["max_map_count"] > 0
    assert "sdpa" in facts["kernels"]["attention"]
    host = facts["driver for cpu"]
    assert host["name"] == "host"
    assert host["page_nbytes"] % host["granularity_nbytes"] == 0
    # The budget counts control groups and a reserve, which the system's figure does not.
    assert 0 < host["budget_nbytes"] < facts["memory"]["total_nbytes"]


def test_the_list_for_people_has_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "driver for cpu\n  name" in shown
    assert "granularity        4 KiB" in shown
    assert "max map count" in shown


def test_a_missing_driver_is_told_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_device: str) -> None:
        raise ConfigError("no such device")

    monkeypatch.setattr("vattention.memory.open_driver", refuse)
    assert info.driver("cuda") == {"missing": "no such device"}
