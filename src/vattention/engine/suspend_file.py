"""A file of keys, values and a record about them, written whole or not at all, and checked when it is read.

It is a safetensors file: what it holds can be read by anyone, and reading it runs no code. The record is JSON in
the file's metadata, beside a checksum over it and all tensors.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vattention.errors import DriverError, RequestError

VERSION = 1
"""Of the record; a file of another version is refused."""

_RECORD, _CHECKSUM = "vattention", "checksum"


def write(path: str | Path, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a file that others see only once it is complete; one that was there before stays until then.

    Raises:
        OSError, DriverError: it cannot be written; nothing is left of it.
    """
    path = Path(path)
    here = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"version": VERSION, **record})
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        try:
            save_file(here, made, {_RECORD: text, _CHECKSUM: _checksum(text, here)})
        except SafetensorError as error:
            raise DriverError("writing a conversation", 0, str(error)) from error
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)
    except BaseException:
        os.unlink(made)
        raise
    finally:
        os.close(descriptor)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the tensors of a file that `write` wrote.

    Raises:
        OSError: it cannot be opened.
        RequestError: it is no such file, or not as it was written.
    """
    path = Path(path)
    path.open("rb").close()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise _unusable(path, f"it is cut short or damaged ({error})") from error
    if _RECORD not in metadata:
        raise _unusable(path, "it holds no suspended conversation")
    if metadata.get(_CHECKSUM) != _checksum(metadata[_RECORD], tensors):
        raise _unusable(path, "its checksum does not match: it is damaged")
    record: dict[str, Any] = json.loads(metadata[_RECORD])
    if record["version"] != VERSION:
        raise _unusable(path, f"its format is version {record['version']}, and this program reads {VERSION}")
    return record, tensors


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].view(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _unusable(path: Path, reason: str) -> RequestError:
    return RequestError(f"{str(path)!r} cannot be resumed: {reason}", param="path")
