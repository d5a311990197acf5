"""What MODEL names: a folder, a GGUF file, or a repository of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vattention.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """Where transformers is to load from.

    Attributes:
        location: a folder, or a hub repository's id.
        gguf_file: the name of a GGUF file in it, or None.
    """

    location: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, besides the location."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def find(name: str, what: str = "model") -> Source:
    """Find a model, or a tokenizer.

    Raises:
        ConfigError: a path that is not there, or a folder that holds no safe weights.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{what} {name!r} is a file, but no GGUF file (*.gguf); name its folder instead")
        return Source(str(path.parent), path.name)
    if path.is_dir():
        return Source(str(path))
    if name.startswith(("/", "./", "../", "~")) or name.lower().endswith(".gguf") or name.count("/") > 1:
        raise ConfigError(f"{what} {name!r}: there is no such file or folder")
    return Source(name)


def check_weights(source: Source) -> None:
    """Refuse weights that are not safetensors: unpickling a file runs whatever code is in it.

    Raises:
        ConfigError: the folder holds no config.json, or no weights, or only pickled ones.
    """
    folder = Path(source.location)
    if not source.is_local or source.gguf_file is not None:
        return
    if not (folder / "config.json").is_file():
        guesses = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; it holds {guesses[0]}: name that file" if guesses else ""
        raise ConfigError(f"model folder {source.location!r} has no config.json{hint}")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ConfigError(
            f"model folder {source.location!r} has only pickled weights ({pickled[0]}), and unpickling can run any "
            "code; where you trust them, load them with transformers and save_pretrained as safetensors"
        )
    raise ConfigError(f"model folder {source.location!r} has no weights: there is no *.safetensors file in it")
