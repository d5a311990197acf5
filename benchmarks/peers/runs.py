"""The file that keeps all runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import Figures
from benchmarks.peers.environments import ROOT, Environment


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
