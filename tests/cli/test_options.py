from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from cyclopts import App, CycloptsError

from vattention.cli.options import Options, OptionsOf, attribute_docs, takes
from vattention.config import EngineConfig
from vattention.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Of a car.

    Attributes:
        body: outside,
            all round.
        roof, doors: of the rest.
        shiny: polished.
        matt: not polished.
        weights: by number.

    Raises:
        nothing: ever.
    """

    body: str
    roof: str | None = None
    doors: int = 4
    shiny: bool = True
    matt: bool = False
    weights: Mapping[int, float] = field(default_factory=dict)


def run(arguments: str, **source: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @takes(colours=OptionsOf(Colours, "Colours", **source))
    def paint(car: str, /, *parts: str, quick: bool = False, colours: Options) -> None:
        seen.update(car=car, parts=parts, quick=quick, colours=colours)

    app = App(name="test", result_action="return_value")
    app.default(paint)
    app(arguments, print_error=False, exit_on_error=False)
    return seen


def test_only_what_the_user_gave_arrives() -> None:
    assert run("mini --body red door roof --quick") == {
        "car": "mini",
        "parts": ("door", "roof"),
        "quick": True,
        "colours": {"body": "red"},
    }


def test_values_have_the_fields_types() -> None:
    given = run("mini --body red --roof blue --doors 5 --no-shiny --matt --weights 3 1.5 --weights 4 -2")["colours"]
    assert given == {
        "body": "red",
        "roof": "blue",
        "doors": 5,
        "shiny": False,
        "matt": True,
        "weights": {3: 1.5, 4: -2.0},
    }


def test_a_command_may_have_other_defaults_and_fewer_options() -> None:
    assert run("mini", omit={"body"}, defaults={"doors": 2})["colours"] == {"doors": 2}
    assert run("mini --doors 3", omit={"body"}, defaults={"doors": 2})["colours"] == {"doors": 3}
    with pytest.raises(CycloptsError, match="Unknown option"):
        run("mini --body red", omit={"body"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mini", "--body"),
        ("mini --body red --doors many", "--doors"),
        ("mini --body red --no-matt", "Unknown option"),
        ("mini --body red --weights 3", "--weights"),
        ("mini --body red --weights a 3", "--weights"),
    ],
)
def test_wrong_options_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(CycloptsError, match=message):
        run(arguments)


def test_help_comes_from_the_docstring() -> None:
    assert attribute_docs(Colours) == {
        "body": "outside, all round.",
        "roof": "of the rest.",
        "doors": "of the rest.",
        "shiny": "polished.",
        "matt": "not polished.",
        "weights": "by number.",
    }


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_field_of_the_real_options_has_a_help_text(cls: type) -> None:
    docs = attribute_docs(cls)
    assert docs.keys() == {field.name for field in dataclasses.fields(cls)}
    assert all(docs.values())


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_field_of_the_real_options_is_an_option_with_its_default(cls: type) -> None:
    parameters = {parameter.name: parameter for parameter in OptionsOf(cls, "Options").parameters()}
    for made in dataclasses.fields(cls):
        default = parameters[made.name].default
        if made.default_factory is not dataclasses.MISSING:
            assert dict(default) == made.default_factory()
        elif made.default is dataclasses.MISSING:
            assert default is inspect.Parameter.empty
        else:
            assert default == made.default
