"""What MODEL names: a folder, a GGUF file, or a repository of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vattention.errors import ConfigError

_LFS_POINTER = b"version https://git-lfs"


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
    if name.startswith((".", "/", "~")) or name.lower().endswith((".gguf", "/")) or name.count("/") > 1:
        raise ConfigError(f"{what} {name!r}: there is no such file or folder")
    return Source(name)


def check_weights(source: Source) -> None:
    """Refuse weights that are not safetensors: unpickling a file runs whatever code is in it.

    Raises:
        ConfigError: the folder holds no config.json, or no weights, or only pickled ones, or a file that is cut
            short, damaged or not there at all.
    """
    folder = Path(source.location)
    if not source.is_local or source.gguf_file is not None:
        return
    if not (folder / "config.json").is_file():
        guesses = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; it holds {guesses[0]}: name that file" if guesses else ""
        raise ConfigError(f"model folder {source.location!r} has no config.json{hint}")
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        _check_whole(path)
    if weights:
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ConfigError(
            f"model folder {source.location!r} has only pickled weights ({pickled[0]}), and unpickling can run any "
            "code; where you trust them, load them with transformers and save_pretrained as safetensors"
        )
    raise ConfigError(f"model folder {source.location!r} has no weights: there is no *.safetensors file in it")


def _check_whole(path: Path) -> None:
    """Read a file's list of tensors, which says how long the file must be."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        if not is_pointer:
            with safe_open(path, framework="numpy"):
                return
    except OSError as error:
        raise ConfigError(f"cannot read the weights in {str(path)!r}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConfigError(
            f"the weights in {str(path)!r} are cut short or damaged ({error}); download the file again"
        ) from error
    raise ConfigError(
        f"{str(path)!r} is no file of weights but Git LFS's pointer to one; fetch it with git lfs pull"
    )
