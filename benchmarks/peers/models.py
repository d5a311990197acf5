"""The same model in every engine's own file format, made once and kept in the cache folder.

nice -n 19 python -m benchmarks.peers.models demo llama-1b
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers import random_llama
from benchmarks.peers.environments import LLAMACPP, OPENVINO, ROOT, Environment
from vattention.model import demo

DEMO, RANDOM_LLAMA = "demo", "llama-1b"
MODELS = (DEMO, RANDOM_LLAMA)


class ModelError(Exception):
    """A model's file could not be made."""


def path(model: str, file: str) -> Path:
    """The model's file or folder for an engine; made if it is not there.

    Args:
        file: a key of `FILES`.

    Raises:
        ModelError: it could not be made; says why.
    """
    if model == DEMO and file == "checkpoint":
        return demo.demo_folder()
    target = demo.cache_folder() / "peers" / model / file
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{file}.", dir=target.parent))
        try:
            FILES[file](model, temporary / file)
            (temporary / file).rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _checkpoint(_model: str, target: Path) -> None:
    random_llama.write(target)


def _bf16_gguf(model: str, target: Path) -> None:
    from benchmarks.peers import gguf_file  # which needs a package of the extra "demo"

    like = _packaged_gguf(target.with_name("packaged.gguf")) if model == DEMO else None
    gguf_file.write(path(model, "checkpoint"), target, like)


def _q4_k_m_gguf(model: str, target: Path) -> None:
    """The demo model's own file is Q4_K_M already; what is in bfloat16 elsewhere was made of it."""
    if model == DEMO:
        _packaged_gguf(target)
    else:
        _quantize(model, target, "q4_k_m")


def _packaged_gguf(target: Path) -> Path:
    return Path(importlib.import_module(demo.PACKAGE).assemble(target))


def _quantize(model: str, target: Path, kind: str) -> None:
    source = path(model, "bf16.gguf")
    _run(LLAMACPP, ["benchmarks.peers.quantize_gguf", str(source), str(target), kind])


def _openvino(model: str, target: Path, weights: str) -> None:
    """The converter knows no bfloat16; its 16 bits are fp16, and products are computed in bfloat16 all the same."""
    checkpoint = path(model, "checkpoint")
    command = ["optimum.commands.optimum_cli", "export", "openvino", "--model", str(checkpoint)]
    _run(OPENVINO, [*command, "--task", "text-generation-with-past", "--weight-format", weights, str(target)])


def _run(environment: Environment, command: Sequence[str]) -> None:
    try:
        subprocess.run(
            [environment.python, "-m", *command],
            cwd=ROOT,
            env=environment.run_variables(),
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError as error:
        raise ModelError(
            f"{environment.name} is not installed; run python -m benchmarks.peers.install {environment.name}"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ModelError(f"{command[0]} ended with {error.returncode}: {error.stderr[-1500:]}") from error


FILES: dict[str, Callable[[str, Path], None]] = {
    "checkpoint": _checkpoint,
    "bf16.gguf": _bf16_gguf,
    "q8_0.gguf": lambda model, target: _quantize(model, target, "q8_0"),
    "q4_k_m.gguf": _q4_k_m_gguf,
    "openvino-fp16": lambda model, target: _openvino(model, target, "fp16"),
    "openvino-int8": lambda model, target: _openvino(model, target, "int8"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make models for all engines.")
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=[*MODELS, []], metavar="model")
    failed = 0
    for model in parser.parse_args().models:
        for file in FILES:
            try:
                print(path(model, file))
            except ModelError as error:
                print(f"{model}, {file}: {error}", file=sys.stderr)
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
