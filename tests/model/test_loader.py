from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.model.tiny import byte_level, tiny_folder, tiny_llama
from vattention.config import EngineConfig
from vattention.errors import ConfigError, UnsupportedModelError
from vattention.model.context import context_len
from vattention.model.generation import generation_defaults
from vattention.model.loader import LoadedModel, load

TOKENS = torch.tensor([[1, 5, 9, 30, 31, 77]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "llama")


def load_ids(folder: Path, **options: Any) -> LoadedModel:
    return load(EngineConfig(model=str(folder), skip_tokenizer_init=True, **options))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=TOKENS).logits
    return out


def rewrite(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder(folder: Path) -> None:
    loaded = load(EngineConfig(model=str(folder)))
    assert loaded.name == str(folder)
    assert torch.equal(logits(loaded.model), logits(tiny_llama()))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.hf_config is loaded.model.config
    assert loaded.max_model_len == 128
    assert loaded.generation.eos_token_ids == {2}
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hello")) == "hello"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(folder: Path, dtype: Any) -> None:
    assert load_ids(folder, dtype=dtype).model.dtype == getattr(torch, dtype)


def test_device(folder: Path) -> None:
    assert load_ids(folder, device="cpu").model.device.type == "cpu"
    for device, reason in (("gpu", "not known"), ("meta", "cannot hold"), ("cuda:99", r"torch sees \d+ GPUs")):
        with pytest.raises(ConfigError, match=reason):
            load_ids(folder, device=device)


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert load_ids(tmp_path).model.dtype == torch.bfloat16


def test_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", tokenizer=False)
    assert load_ids(folder).tokenizer is None
    with pytest.raises(ConfigError, match="skip_tokenizer_init=True"):
        load(EngineConfig(model=str(folder)))
    byte_level().save_pretrained(tmp_path / "tokenizer")
    assert load(EngineConfig(model=str(folder), tokenizer=str(tmp_path / "tokenizer"))).tokenizer is not None


def test_max_model_len(folder: Path) -> None:
    assert load_ids(folder, max_model_len=77).max_model_len == 77
    with pytest.raises(ConfigError, match=r"max_model_len=129 .*128 tokens"):
        load_ids(folder, max_model_len=129)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 4096, "sliding_window": 512}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {},
                },
            },
            131072,
        ),
    ],
    ids=str,
)
def test_context_lengths(config: dict[str, Any], expected: int) -> None:
    assert context_len(SimpleNamespace(model_type="x", **config), None) == expected


def test_an_unknown_context_length() -> None:
    config = SimpleNamespace(model_type="mpt")
    assert context_len(config, 300) == 300
    with pytest.raises(ConfigError, match="set max_model_len"):
        context_len(config, None)


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/model",
        "./model",
        "../model",
        ".cache/model",
        "~/no/model",
        "some/where/else",
        "model/",
        "a/b.GGUF",
    ],
)
def test_a_missing_path(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*no such file or folder"):
        load(EngineConfig(model=name))


def test_a_missing_repository() -> None:
    with pytest.raises(ConfigError, match=r"nobody/nothing.*hub"):
        load(EngineConfig(model="nobody/nothing"))


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no GGUF file"):
        load_ids(folder / "config.json")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*safetensors"):
        load_ids(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights"):
        load_ids(folder)


@pytest.mark.parametrize("left", [0, 5, 5000])
def test_weights_cut_short_are_named(folder: Path, left: int) -> None:
    os.truncate(folder / "model.safetensors", left)
    with pytest.raises(
        ConfigError, match=r"model\.safetensors' are cut short or damaged .*; download the file again"
    ):
        load(EngineConfig(model=str(folder)))


def test_a_pointer_of_git_lfs_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigError, match="git lfs pull"):
        load(EngineConfig(model=str(folder)))


def test_weights_that_cannot_be_read_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"cannot read the weights in .*model\.safetensors': No such file"):
        load(EngineConfig(model=str(folder)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"hidden_size": 64},
            r"other shapes than its configuration says: \S+ is \[.*\] and should be \[.*and 20 more",
        ),
        (
            {"num_attention_heads": 3},
            "cannot read the configuration of .*not a multiple of the number of attention",
        ),
        ({"vocab_size": "many"}, "cannot read the configuration of .*'vocab_size'"),
        ({"hidden_act": "other"}, "KeyError: 'other'"),
        ({"num_hidden_layers": 3}, r"lacks weights of .*: model\.layers\.2\.\S+, and 8 more; it is not whole"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        load(EngineConfig(model=str(folder)))


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    bare = tiny_folder(tmp_path / "bare", tokenizer=False)
    with pytest.raises(ConfigError, match=r"there is no tokenizer\.json in it; name one with tokenizer="):
        load(EngineConfig(model=str(bare)))
    (bare / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ConfigError, match=r"cannot load a tokenizer from .*KeyError: 'added_tokens'"):
        load(EngineConfig(model=str(bare)))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ConfigError, match=r"no config\.json.*weights\.gguf"):
        load_ids(tmp_path)


def test_an_architecture_nobody_knows(folder: Path) -> None:
    rewrite(folder / "config.json", model_type="from_the_future", architectures=["FutureForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="does not know"):
        load_ids(folder)


def test_code_of_the_models_own_does_not_run(folder: Path) -> None:
    rewrite(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"},
    )
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        load_ids(folder)
    assert not (folder / "ran").exists()


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_encoders_are_refused(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=100, **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"BertForMaskedLM is not causal"):
        load_ids(tmp_path)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_ids(tmp_path)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    """It has no output embeddings; transformers would make some up."""
    LlamaForSequenceClassification(tiny_llama().config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):
        load_ids(tmp_path)


VISION = {**SMALL, "image_size": 28, "patch_size": 14}


def gemma3() -> PreTrainedModel:
    text = {"vocab_size": 100, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, **SMALL}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    model: PreTrainedModel = Gemma3ForConditionalGeneration(config)
    return model


def llava() -> PreTrainedModel:
    text = {"model_type": "llama", "vocab_size": 100, **SMALL}
    vision = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
    model: PreTrainedModel = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
    return model


@pytest.mark.parametrize(("make", "text"), [(gemma3, "Gemma3ForCausalLM"), (llava, "LlamaForCausalLM")])
def test_the_text_part_of_a_multimodal_model(make: Any, text: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = make().eval()
    whole.save_pretrained(tmp_path)
    loaded = load_ids(tmp_path)
    assert type(loaded.model).__name__ == text
    torch.testing.assert_close(logits(loaded.model), logits(whole))
    assert loaded.hf_config.num_hidden_layers == 2
    assert not any("vision" in name for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize(
    ("values", "ends", "sampling"),
    [
        ({}, set(), {}),
        ({"eos_token_id": 7}, {7}, {}),
        ({"eos_token_id": [1, 106]}, {1, 106}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 64, "top_p": 0.95, "repetition_penalty": 1.1},
            set(),
            {"temperature": 0.6, "top_k": 64, "top_p": 0.95, "repetition_penalty": 1.1},
        ),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, set(), {"repetition_penalty": 1.1}),
        ({"min_p": 0.1, "top_p": 7.0}, set(), {"min_p": 0.1}),
    ],
    ids=str,
)
def test_generation_defaults(values: dict[str, Any], ends: set[int], sampling: dict[str, Any]) -> None:
    defaults = generation_defaults(SimpleNamespace(**values))
    assert defaults.eos_token_ids == ends
    assert defaults.sampling == sampling


def test_end_tokens_have_fallbacks() -> None:
    nothing, config, tokenizer = (
        SimpleNamespace(eos_token_id=None),
        SimpleNamespace(),
        SimpleNamespace(eos_token_id=5),
    )
    assert generation_defaults(nothing, config, tokenizer).eos_token_ids == {5}
    assert generation_defaults(SimpleNamespace(eos_token_id=4), config, tokenizer).eos_token_ids == {4}
    assert generation_defaults(SimpleNamespace(eos_token_id=0), tokenizer).eos_token_ids == {0}


def test_generation_config_json(folder: Path) -> None:
    rewrite(folder / "generation_config.json", eos_token_id=[2, 3], do_sample=True, top_k=20)
    generation = load_ids(folder).generation
    assert generation.eos_token_ids == {2, 3}
    assert generation.sampling == {"top_k": 20}


def test_no_generation_config_json(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    generation = load_ids(folder).generation
    assert generation.eos_token_ids == {2}
    assert generation.sampling == {}


def test_what_is_quantized_already_is_not_quantized_again(folder: Path) -> None:
    rewrite(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="quantized by gptq; leave quantization out"):
        load_ids(folder, quantization="int8")
