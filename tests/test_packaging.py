"""What a wheel and a fresh clone need to be right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vattention

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert vattention.__version__ == version == newest[1]


def test_files_named_by_the_project_exist() -> None:
    named = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]]
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_file_in_the_package_is_in_the_wheel() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    listed = subprocess.run(
        ["git", "ls-files", "src/vattention"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    others = [Path(line).name for line in listed.stdout.splitlines() if not line.endswith(".py")]
    assert "py.typed" in others
    assert [name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_extras_for_developers_include_those_for_users() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (own,) = (Requirement(line) for line in extras["dev"] if Requirement(line).name == "vattention")
    listed = {str(Requirement(line)) for line in extras["dev"]}
    missing = {
        name
        for name, lines in extras.items()
        if name not in {"dev", *own.extras} and not {str(Requirement(line)) for line in lines} <= listed
    }
    assert missing == set()


def test_the_command_is_the_one_that_is_tested() -> None:
    assert PROJECT["project"]["scripts"] == {"vattention": "vattention.cli.main:main"}
    installed = list(entry_points(group="console_scripts", name="vattention"))
    assert [entry.value for entry in installed] in ([], ["vattention.cli.main:main"])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "last_command"),
    [
        ("serve", ".venv/bin/vattention serve demo --host 127.0.0.1 --port 8000"),
        ("test", ".venv/bin/python -m pytest"),
        ("lint", ".venv/bin/mypy"),
    ],
)
def test_make_targets_install_first_and_then_run(target: str, last_command: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    # As from a shell, although the tests themselves may have been started by make.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    command = ["make", "-n", target]
    dry = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    commands = dry.stdout.splitlines()
    assert any("pip install" in command and ".[dev]" in command for command in commands)
    assert commands[-1] == last_command


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_when_python_is_too_old(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "older than Python 3.11" in done.stderr
