"""An engine's process, which loads its model once and then does one workload after another."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
from collections.abc import Sequence

from benchmarks.peers.cases import Figures
from benchmarks.peers.environments import ROOT, Environment
from benchmarks.workloads import Request

LAST_OF_MESSAGE = 1500
"""Bytes of a failed process's output that are kept."""
CLOSING_S = 30.0


class RunError(Exception):
    """An engine did not do the work; says why."""


class Worker:
    """A running script of an engine.

    Work goes in and figures come back, a line of JSON each, through a socket that is the process's input: engines
    print what they like to its output.

    Args:
        command: the script with its model and options.

    Raises:
        RunError: the environment is not installed.
    """

    def __init__(self, environment: Environment, command: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._lines = self._socket.makefile()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment.run_variables(),
                stdin=theirs.fileno(),
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError as error:
            self._close_files()
            raise RunError(
                f"{environment.name} is not installed; run python -m benchmarks.peers.install {environment.name}"
            ) from error
        finally:
            theirs.close()

    def run(self, requests: Sequence[Request], timeout_s: float, idle_s: float = 0.0) -> Figures:
        """Do a workload. A worker that raised is closed.

        Args:
            idle_s: seconds to do nothing in afterwards, while its processor time is measured; none if 0.

        Raises:
            RunError: it took too long or the process ended; has the last of what it said.
        """
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(json.dumps({"requests": requests, "idle_s": idle_s}).encode() + b"\n")
            line = self._lines.readline()
        except TimeoutError as error:
            self._process.kill()
            self.close()
            raise RunError(f"took longer than {timeout_s / 60:.0f} minutes") from error
        except (BrokenPipeError, ConnectionResetError):
            line = ""
        if not line:
            code = self._wait()
            said = self._said()
            self._close_files()
            raise RunError(f"ended with {code}: {said}")
        figures: Figures = json.loads(line)
        return figures

    def close(self) -> None:
        """End the process: no more work comes, and if that does not help, by force."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._wait()
        self._close_files()

    def _wait(self) -> int:
        try:
            return self._process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _said(self) -> str:
        self._output.seek(0)
        return self._output.read()[-LAST_OF_MESSAGE:].decode(errors="replace").strip()

    def _close_files(self) -> None:
        self._lines.close()
        self._socket.close()
        self._output.close()
