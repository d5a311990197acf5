"""What an engine refuses before it loads a model."""

from __future__ import annotations

from typing import Any

import pytest

from vattention.config import EngineConfig
from vattention.engine.build import build
from vattention.errors import ConfigError
from vattention.model import loader


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swap_space": "/no/such/folder:1GiB"}, "/no/such/folder"),
        ({"swap_space": "1GiB"}, "limit it with kv_memory"),
        ({"attention": "fast"}, "choose 'auto', "),
        ({"page_size": 5000}, "page_size=5000"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_options_that_no_model_could_go_with(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "find", lambda name: pytest.fail("looked for the model"))
    with pytest.raises(ConfigError, match=message):
        build(EngineConfig(model="m", **options))
