"""The rooms and the direction of the arrows between them, read from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "vattention"

LEAVES = frozenset(
    {
        "config",
        "core",
        "errors",
        "fields",
        "garbage",
        "interrupts",
        "outputs",
        "sampling_params",
        "structured_outputs",
        "vllm_options",
    }
)

ARROWS = {
    **dict.fromkeys(LEAVES, frozenset[str]()),
    "memory": frozenset(),
    "kv": frozenset({"memory"}),
    "attention": frozenset({"kv.manager", "native"}),
    "native": frozenset(),
    "model": frozenset({"attention", "kv", "native"}),
    "engine": frozenset({"model", "kv"}),
    "bench": frozenset({"attention", "engine", "kv", "model.runner"}),
    "server": frozenset({"engine", "kv.manager"}),
    "cli": frozenset({"attention", "bench", "engine", "memory", "native", "server"}),
    "llm": frozenset({"engine", "model.tokenizer"}),
    "hf": frozenset({"memory"}),
    "virtual_cache": frozenset({"hf"}),
    "__main__": frozenset({"cli"}),
    # It names everybody's home, and imports it on first use.
    "__init__": frozenset({"engine", "llm", "virtual_cache"}),
}
"""What a room, or a module beside the rooms, may import of this package besides the leaves."""

OUTSIDE = {
    "cyclopts": {"cli"},
    "fastapi": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "llguidance": {"model.grammar"},
    "transformers": {"model", "hf", "virtual_cache"},
    "torch": {
        "memory.tensor",
        "memory.cuda_calls",
        "kv",
        "attention",
        "model",
        "native",
        "engine",
        "bench.memory",
        "bench.numerics",
        "hf",
        "virtual_cache",
    },
    "cuda": {"memory.cuda", "memory.cuda_calls"},
}
"""The only places where a library may be imported."""


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py"))


def dotted(path: Path) -> str:
    """`kv/layout.py` as "kv.layout", `kv/__init__.py` as "kv"."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the arrow"
            names = [node.module or ""]
            if node.module == "vattention" or _is_package(node.module or ""):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names)


def _is_package(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "vattention" and SOURCE.joinpath(*rest).is_dir()


def within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def wrong_arrows(path: Path) -> list[str]:
    room = dotted(path).split(".", maxsplit=1)[0]
    allowed = {room} | LEAVES | ARROWS[room] if room not in LEAVES else LEAVES
    return [
        f"{path.relative_to(SOURCE)}:{line} imports {name}"
        for line, name in imports(path)
        if within(name, "vattention")
        and not any(within(name.removeprefix("vattention."), place) for place in allowed)
        and name != "vattention.__version__"
    ]


def wrong_libraries(path: Path) -> list[str]:
    return [
        f"{path.relative_to(SOURCE)}:{line} imports {name}"
        for line, name in imports(path)
        for library, places in OUTSIDE.items()
        if within(name, library) and not any(within(dotted(path), place) for place in places)
    ]


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_follow_the_arrows(path: Path) -> None:
    assert not wrong_arrows(path)


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    assert not wrong_libraries(path)


def test_the_arrows_have_no_cycle() -> None:
    rooms = {room: {place.split(".")[0] for place in places} for room, places in ARROWS.items()}
    while rooms:
        free = {room for room, places in rooms.items() if not places & rooms.keys()}
        assert free, f"a cycle among {sorted(rooms)}"
        rooms = {room: places for room, places in rooms.items() if room not in free}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kv/layout.py", "from vattention.engine.engine import LLMEngine"),
        ("kv/layout.py", "from vattention import LLM"),
        ("attention/sdpa.py", "from vattention.kv import virtual"),
        ("memory/host.py", "def late():\n    import vattention.kv.manager"),
        ("core.py", "from vattention.memory.runs import runs"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / module
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    (tmp_path / "kv").mkdir(exist_ok=True)
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    assert len(wrong_arrows(path)) == 1


def test_a_library_in_the_wrong_room_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    path = tmp_path / "memory" / "pool.py"
    path.parent.mkdir()
    path.write_text("import torch.nn\nfrom torch import Tensor")
    assert len(wrong_libraries(path)) == 2
