"""Install the peers, each in a virtual environment of its own.

    nice -n 19 python -m benchmarks.peers.install            # all
    nice -n 19 python -m benchmarks.peers.install vllm       # one

llama.cpp is compiled for this processor, which takes 20 minutes or more on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.environments import ENVIRONMENTS, ROOT, Environment

REQUIRES = "import importlib.metadata as m, json, sys; print(json.dumps(m.requires(sys.argv[1]) or []))"


def install(environment: Environment) -> None:
    """Make the environment anew.

    Raises:
        subprocess.CalledProcessError: pip, or apt-get for a Debian package, did not succeed.
    """
    shutil.rmtree(environment.folder, ignore_errors=True)
    venv.create(environment.folder, with_pip=True)
    if environment.left_out:
        _pip(environment, ["--no-deps", *environment.requirements])
        named = json.loads(_output([str(environment.python), "-c", REQUIRES, environment.distribution]))
        _pip(environment, wanted(named, environment.left_out))
    else:
        _pip(environment, environment.requirements)
    if environment.uninstalled:
        command = [str(environment.python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.uninstalled]
        subprocess.run(command, check=True)
    for name in environment.debs:
        _unpack_deb(name, environment.folder)


def wanted(requirements: Sequence[str], left_out: Sequence[str]) -> list[str]:
    """The requirements that belong to no extra, without those left out."""
    return [
        requirement
        for requirement in requirements
        if "extra ==" not in requirement and not requirement.startswith(tuple(left_out))
    ]


def _pip(environment: Environment, requirements: Sequence[str]) -> None:
    subprocess.run(
        [environment.python, "-m", "pip", "install", "--quiet", *requirements],
        env={**os.environ, **environment.build},
        check=True,
    )


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _unpack_deb(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        subprocess.run(["apt-get", "download", "-qq", name], cwd=downloads, check=True)
        for deb in Path(downloads).glob("*.deb"):
            subprocess.run(["dpkg", "-x", deb, folder / "debs"], check=True)


def main() -> int:
    own = [name for name, environment in ENVIRONMENTS.items() if environment.requirements]
    parser = argparse.ArgumentParser(description="Install the engines to compare with.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(own)}; all by default")
    names = parser.parse_args().names or own
    if unknown := set(names) - set(own):
        parser.error(f"{', '.join(sorted(unknown))}: not of {', '.join(own)}")
    failed = []
    for name in names:
        try:
            install(ENVIRONMENTS[name])
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
        else:
            print(f"{name}: in {ENVIRONMENTS[name].folder.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
