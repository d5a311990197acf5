"""The engines' processes of one round, loaded once each as long as there is memory."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.peers import models
from benchmarks.peers.cases import Case, Figures
from benchmarks.peers.rows import Row
from benchmarks.peers.worker import RunError, Worker

SHARE_LEFT = 0.4
"""Of the machine's memory, for the engine that is at work and for what it reads from files."""
IDLE_WORKLOAD, IDLE_S = "w2", 3.0


class Workers:
    """A process per row, which stays when its turn is over, asleep, and goes on with the next workload.

    When memory becomes scarce, those that start quickest are ended first.

    Args:
        longest: tokens of the longest prompt with its output in all the work there is.
    """

    def __init__(self, model: str, longest: int, timeout_s: float) -> None:
        self._model = model
        self._longest = longest
        self._timeout_s = timeout_s
        self._open: dict[str, Worker] = {}
        self._starts_s: dict[str, float] = {}

    def run(self, case: Case, row: Row) -> Figures:
        """One run of one row.

        Raises:
            RunError: the engine could not be run or failed; its next run is in a new process.
        """
        self._make_room(row)
        worker = self._open.pop(row.name, None) or self._start(row)
        figures = worker.run(case.requests, self._timeout_s, IDLE_S if case.workload == IDLE_WORKLOAD else 0.0)
        if row.workloads == {case.workload}:
            worker.close()
        else:
            self._open[row.name] = worker
        if figures["cold_start_s"] is not None:
            self._starts_s[row.name] = figures["cold_start_s"]
        return figures

    def close(self) -> None:
        """End all processes; the next run of each row starts one."""
        while self._open:
            self._open.popitem()[1].close()

    def _start(self, row: Row) -> Worker:
        try:
            file = str(models.path(self._model, row.file))
        except (models.ModelError, ValueError) as error:
            raise RunError(str(error)) from error
        command = [str(row.environment.python), "-m", row.module, file, "--longest", str(self._longest)]
        return Worker(row.environment, [*command, *row.options])

    def _make_room(self, row: Row) -> None:
        while memory("MemAvailable") < SHARE_LEFT * memory("MemTotal"):
            others = [name for name in self._open if name != row.name]
            if not others:
                break
            self._open.pop(min(others, key=self._starts_s.__getitem__)).close()


def memory(name: str) -> int:
    """An entry of /proc/meminfo, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise RunError(f"/proc/meminfo has no {name}; the comparison needs a Linux /proc")
    return int(found[1]) * 1024
