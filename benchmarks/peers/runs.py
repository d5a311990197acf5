"""Runs of an engine, each in a process of its own, and the file that keeps them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import models
from benchmarks.peers.cases import Case, Figures
from benchmarks.peers.environments import ROOT, Environment
from benchmarks.peers.rows import Row
from benchmarks.workloads import Request

LAST_OF_MESSAGE = 1500
"""Characters of a failed process's error output that are kept."""


class RunError(Exception):
    """An engine did not do the work; says why."""


def run(case: Case, row: Row, model: str, timeout_s: float) -> Figures:
    """One run of one row.

    Raises:
        RunError: the engine could not be run or failed.
    """
    try:
        file = str(models.path(model, row.file))
        command = [str(row.environment.python), "-m", row.module, file, *row.options]
        return run_process(row.environment, command, case.requests, timeout_s)
    except (models.ModelError, ValueError) as error:
        raise RunError(str(error)) from error


def run_process(
    environment: Environment, command: Sequence[str], requests: list[Request], timeout_s: float
) -> Figures:
    """Run an engine's script.

    Raises:
        RunError: it did not end well; has the last of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder, "requests.jsonl"), Path(folder, "figures.json")
        work.write_text("".join(json.dumps(request) + "\n" for request in requests))
        try:
            done = subprocess.run(
                [*command, "--requests", str(work), "--json", str(out)],
                cwd=ROOT,
                env=environment.run_variables(),
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=timeout_s,
            )
        except FileNotFoundError as error:
            raise RunError(
                f"{environment.name} is not installed; run python -m benchmarks.peers.install {environment.name}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise RunError(f"took longer than {timeout_s / 60:.0f} minutes") from error
        if done.returncode:
            raise RunError(f"ended with {done.returncode}: {done.stderr[-LAST_OF_MESSAGE:].strip()}")
        figures: Figures = json.loads(out.read_text())
        return figures


class Results:
    """All runs so far, in a JSON file that is written after each, so that a comparison can be gone on with.

    Args:
        file: read if it is there.
        conditions: what the runs have in common, such as the model.

    Raises:
        ValueError: the file's runs were made under other conditions.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]) -> None:
        self._file = file
        self._content: dict[str, Any] = {"conditions": conditions, "installed_bytes": {}, "cases": {}}
        if file.exists():
            self._content = json.loads(file.read_text())
            if self._content["conditions"] != conditions:
                raise ValueError(
                    f"{file} has runs with {self._content['conditions']}, not {conditions}; choose another --output"
                )

    @property
    def conditions(self) -> dict[str, Any]:
        found: dict[str, Any] = self._content["conditions"]
        return found

    @property
    def installed_bytes(self) -> dict[str, int]:
        """By environment."""
        found: dict[str, int] = self._content["installed_bytes"]
        return found

    def runs(self, case: str, row: str) -> list[Figures]:
        """A failed run has "error" and nothing else."""
        found: list[Figures] = self._content["cases"].get(case, {}).get(row, [])
        return list(found)

    def add(self, case: str, row: str, figures: Figures) -> None:
        self._content["cases"].setdefault(case, {}).setdefault(row, []).append(figures)
        self._write()

    def forget_failures(self) -> None:
        for rows in self._content["cases"].values():
            for row, runs in rows.items():
                rows[row] = [figures for figures in runs if "error" not in figures]

    def add_installed(self, environment: Environment) -> None:
        """Count the installed size, if that was not done before; an environment that is not there has none."""
        command = [str(environment.python), "-m", "benchmarks.peers.installed"]
        command += [environment.distribution, *environment.counted]
        if environment.name not in self.installed_bytes and environment.python.exists():
            counted = subprocess.run(
                command, cwd=ROOT, env=environment.run_variables(), capture_output=True, text=True, check=True
            )
            self.installed_bytes[environment.name] = int(counted.stdout)
            self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._content, indent=1) + "\n")
        temporary.replace(self._file)
