"""Loading a model and what comes with it, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from vattention.attention.registry import check_name, runnable
from vattention.config import EngineConfig
from vattention.errors import ConfigError, UnsupportedModelError
from vattention.model.context import context_len
from vattention.model.demo import demo_folder
from vattention.model.generation import GenerationDefaults, generation_defaults
from vattention.model.gguf import gguf_options
from vattention.model.source import Source, check_weights, find
from vattention.model.tokenizer import Tokenizer

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model as it came, before anything is done to it.

    Attributes:
        name: as it was asked for.
        model: in eval mode, without gradients.
        hf_config: the configuration of its text part.
        tokenizer: None where token ids only are served.
        max_model_len: longest prompt plus output in tokens.
    """

    name: str
    model: PreTrainedModel
    hf_config: PreTrainedConfig
    tokenizer: Tokenizer | None
    max_model_len: int
    generation: GenerationDefaults


def load(config: EngineConfig) -> LoadedModel:
    """Load the model that `config.model` names; of a multimodal one, the part that reads and writes text.

    Raises:
        ConfigError: it cannot be found or loaded, or an option does not fit it.
        UnsupportedModelError: it is no causal language model.
    """
    device = device_named(config.device)
    check_name(config.attention, runnable(device.type))
    source = find(str(demo_folder()) if config.model == DEMO else config.model)
    check_weights(source)
    hf_config = _load_config(source, config)
    _check_causal(hf_config)
    _check_precision(hf_config, config)
    text_config = hf_config.get_text_config(decoder=True)
    max_model_len = context_len(text_config, config.max_model_len)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(source, config)
    model = _load_model(source, hf_config, config).to(device)
    return LoadedModel(
        name=config.model,
        model=model,
        hf_config=model.config,
        tokenizer=tokenizer,
        max_model_len=max_model_len,
        generation=generation_defaults(model.generation_config, text_config, tokenizer),
    )


def device_named(name: str) -> torch.device:
    """Raises:
    ConfigError: torch has no such device here, or it cannot hold a KV cache.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not known; choose 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} cannot hold a KV cache; choose 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs here; choose 'cpu'")
    return device


def load_tokenizer(source: Source, config: EngineConfig) -> Tokenizer:
    """The model's tokenizer, or the one that `config.tokenizer` names.

    Raises:
        ConfigError: there is none.
    """
    if config.tokenizer is not None:
        source = find(config.tokenizer, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=config.trust_remote_code, **source.options
        )
    except Exception as error:  # whatever transformers' code makes of files that are not as it expects
        why = _reason(error) if _has_tokenizer(source) else "there is no tokenizer.json in it"
        raise ConfigError(
            f"cannot load a tokenizer from {source.location!r}: {why}; name one with tokenizer=, or serve token "
            "ids with skip_tokenizer_init=True"
        ) from error
    return Tokenizer(tokenizer)


def _load_config(source: Source, config: EngineConfig) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            source.location, trust_remote_code=config.trust_remote_code, **source.options
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{config.model!r} runs Python code of its own; read it, then allow it with trust_remote_code=True"
            ) from error
        if "does not recognize this architecture" in str(error):
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} does not know the architecture of {config.model!r}"
            ) from error
        if source.is_local:
            raise ConfigError(f"cannot read the configuration of {config.model!r}: {_reason(error)}") from error
        raise ConfigError(
            f"no model {config.model!r}: there is no folder or GGUF file of this name here, and the Hugging Face "
            f"hub has no such repository, wants a token for it, or cannot be reached: {_reason(error)}"
        ) from error


def _check_causal(config: PreTrainedConfig) -> None:
    """Refuse what no causal language model is made from, as far as the configuration tells."""
    made_for = ", ".join(config.architectures or ()) or config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{made_for} is an encoder-decoder model; only decoders are served")
    text_config = config.get_text_config(decoder=True)
    # Encoders that could serve as decoders have both options.
    is_encoder = hasattr(text_config, "add_cross_attention") and not getattr(text_config, "is_decoder", True)
    if is_encoder or getattr(text_config, "use_bidirectional_attention", False) is True:
        raise UnsupportedModelError(f"{made_for} is not causal: its tokens see those after them")
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not custom:
        raise UnsupportedModelError(
            f"{made_for} is no causal language model: transformers {transformers.__version__} has none for "
            f"{type(text_config).__name__}"
        )


def _check_precision(hf_config: PreTrainedConfig, config: EngineConfig) -> None:
    """Refuse to quantize what has been quantized: numbers packed by another program are none to start from."""
    own = getattr(hf_config, "quantization_config", None)
    if own is not None and config.quantization is not None:
        method = own.get("quant_method", "some way") if isinstance(own, dict) else own.quant_method
        raise ConfigError(
            f"quantization={config.quantization!r} needs weights in full precision, and those of {config.model!r} "
            f"are quantized by {method}; leave quantization out, or name the model that it was made from"
        )


def _load_model(source: Source, hf_config: PreTrainedConfig, config: EngineConfig) -> PreTrainedModel:
    if source.gguf_file is None:
        options: dict[str, Any] = {"dtype": config.dtype, "use_safetensors": True}
    else:
        # The blocks' own types are none to compute in; bfloat16 is what most were quantized from.
        options = gguf_options(source, torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype))
    loader = _loader(hf_config)
    try:
        model, info = loader.from_pretrained(
            source.location,
            config=hf_config,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with what differs
            **options,
        )
    except Exception as error:
        raise ConfigError(f"cannot load {config.model!r}: {_reason(error)}") from error
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise UnsupportedModelError(
            f"{config.model!r} has weights of other shapes than its configuration says: {name} is "
            f"{list(found)} and should be {list(wanted)}{_and_others(mismatched)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnsupportedModelError(
            f"{config.model!r} lacks weights of {type(model).__name__}: {missing[0]}{_and_others(missing)}; it is "
            "not whole, or was made for something other than generating text"
        )
    return text_part(model).eval().requires_grad_(False)


def _loader(config: PreTrainedConfig) -> Any:
    """The class that loads a whole checkpoint: transformers may know a multimodal one under another task only."""
    text_config = config.get_text_config(decoder=True)
    if text_config is config or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]:
        return AutoModelForCausalLM  # which takes the text part only
    return AutoModelForImageTextToText


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside a multimodal one, sharing its weights; any other model as it is.

    Raises:
        UnsupportedModelError: its parts are not those of the language model that its configuration names.
    """
    text_config = model.config.get_text_config(decoder=True)
    if text_config is model.config:
        return model
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(text_config)
    decoder = model.get_decoder()
    if type(decoder) is not type(causal.base_model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a {type(decoder).__name__} inside, "
            f"not the {type(causal.base_model).__name__} of {type(causal).__name__}"
        )
    setattr(causal, causal.base_model_prefix, decoder)
    causal.set_output_embeddings(model.get_output_embeddings())
    causal.config = decoder.config
    causal.generation_config = model.generation_config
    left = [name for name, tensor in [*causal.named_parameters(), *causal.named_buffers()] if tensor.is_meta]
    if left:
        raise UnsupportedModelError(f"{type(model).__name__} has no {left[0]} for {type(causal).__name__}")
    return causal


def _has_tokenizer(source: Source) -> bool:
    return not source.is_local or source.gguf_file is not None or any(Path(source.location).glob("*token*"))


def _and_others(names: Sequence[object]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _reason(error: BaseException) -> str:
    """The first line of what another library says, and the second where the first only announces it."""
    first, *others = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    text = f"{first} {others[0]}" if first.endswith(":") and others else first
    return text if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {text}"
