"""`vattention chat`: a conversation in the terminal."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vattention.cli.files import read_text
from vattention.cli.options import Options, OptionsOf, takes
from vattention.config import EngineConfig
from vattention.errors import ConfigError, RequestError
from vattention.garbage import staying
from vattention.interrupts import held_interrupts
from vattention.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vattention.engine.engine import LLMEngine

Message = dict[str, str]

HELP = "/reset forgets the conversation, Ctrl-C stops a reply, Ctrl-D ends"


@takes(
    engine=OptionsOf(EngineConfig, "Engine", omit=("model",)),
    sampling=OptionsOf(
        SamplingParams,
        "Sampling",
        omit=("n", "seed", "logprobs", "prompt_logprobs", "grammar"),
        defaults={"max_tokens": None},
    ),
)
def chat(
    model: str,
    /,
    *,
    chat_template: Path | None = None,
    engine: Options,
    sampling: Options,
) -> None:
    """Chat with a model in the terminal.

    Type a line to send it. /reset forgets the conversation, Ctrl-C stops a reply, Ctrl-D ends.

    Args:
        model: "demo", a Hugging Face id, a local folder, or a GGUF file.
        chat_template: a file with a Jinja chat template to use instead of the model's own.
    """
    template = None if chat_template is None else read_text(chat_template)
    config = EngineConfig(model=model, **engine)
    if config.skip_tokenizer_init:
        raise ConfigError("chat needs a tokenizer; leave out --skip-tokenizer-init")
    SamplingParams(**sampling)  # a wrong option should not wait for the model to load

    with staying():
        from vattention.engine.engine import LLMEngine

        served = LLMEngine.from_config(config)
    try:
        params = SamplingParams(**{**served.default_sampling, **sampling})
        print(f"{served.model_name}: {HELP}", file=sys.stderr)
        converse(served, params, template)
    finally:
        served.close()


def converse(engine: LLMEngine, params: SamplingParams, template: str | None) -> None:
    """Read lines and print replies until the input ends."""
    messages: list[Message] = []
    for number in itertools.count():
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)
            continue
        if line == "/reset":
            messages.clear()
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                text = reply(engine, f"chat-{number}", messages, params, template)
            except RequestError as error:
                messages.pop()
                print(f"{error}; /reset begins anew", file=sys.stderr)
            else:
                messages.append({"role": "assistant", "content": text})


def reply(
    engine: LLMEngine, request_id: str, messages: list[Message], params: SamplingParams, template: str | None
) -> str:
    """Print the model's next message as it comes and return it, cut short where the user stops it.

    Raises:
        RequestError: the conversation does not fit the model's context, or the template refuses it.
    """
    if engine.tokenizer is None:
        raise ConfigError("this model comes without a tokenizer; name one with --tokenizer")
    prompt = engine.tokenizer.apply_chat_template(messages, template=template, add_generation_prompt=True)
    stop = (*params.stop_strings, *engine.tokenizer.chat_stop_strings(template))
    engine.add_request(request_id, {"prompt_token_ids": prompt}, replace(params, stop=stop))
    text = ""
    with held_interrupts() as let_through:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                news = output.outputs[0].text[len(text) :]
                text += news
                print(news, end="", flush=True)
            try:
                let_through()
            except KeyboardInterrupt:
                engine.abort(request_id)
                break
    print()
    return text
