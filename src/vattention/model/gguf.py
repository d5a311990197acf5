"""GGUF files: quantized checkpoints of one file, unpacked into dense weights when they are loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import GgufConfig

from vattention.errors import ConfigError
from vattention.model.source import Source


def gguf_options(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments with which `from_pretrained` unpacks the file's weights into `dtype`.

    Raises:
        ConfigError: a package that this takes is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"loading {source.gguf_file} takes {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    return {**source.options, "dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
