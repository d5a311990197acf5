"""Where a request enters: its prompt becomes token ids, its parameters are held against the model."""

from __future__ import annotations

import hashlib
import itertools
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from vattention.config import EngineConfig
from vattention.core import Prompt, TextPrompt, TokensPrompt
from vattention.engine.beams import BeamGroup
from vattention.engine.parts import Parts
from vattention.engine.request import Request
from vattention.engine.sequence import Sequence
from vattention.engine.text import TextStream
from vattention.errors import ContextLengthError, RequestError
from vattention.model.grammar import Grammar, Grammars
from vattention.model.sampler import validate
from vattention.outputs import RequestMetrics
from vattention.sampling_params import SamplingParams

_PROMPT_KEYS = TextPrompt.__annotations__.keys() | TokensPrompt.__annotations__.keys()


class Intake:
    """Turns prompts and parameters into `Request`s. Thread-safe."""

    def __init__(self, config: EngineConfig, parts: Parts) -> None:
        self._seed = config.seed
        self._max_num_seqs = config.max_num_seqs
        self._parts = parts
        self._arrivals = itertools.count()
        self._grammars = None if parts.tokenizer is None else Grammars(parts.tokenizer, parts.end_token_ids)

    def request(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int) -> Request:
        """Check everything that can be wrong about a request.

        Raises:
            ContextLengthError: the prompt leaves no room for a token.
            RequestError: anything else that cannot be served.
        """
        # The caller's may change while this runs, and may have changed since they were checked.
        params = replace(params)
        text, token_ids = self._tokenize(prompt)
        validate(params, self._parts.vocab_size)
        if params.stop_strings and self._parts.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this engine serves token ids only", param="stop")
        if params.use_beam_search and params.num_sequences > self._max_num_seqs:
            raise RequestError(
                f"a beam search of {params.num_sequences} beams needs as many slots, and this engine has "
                f"{self._max_num_seqs}; ask for fewer beams or raise max_num_seqs",
                param="beam_width",
            )
        room = self._parts.max_model_len - len(token_ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(token_ids):,} tokens, and this model's context of "
                f"{self._parts.max_model_len:,} tokens must hold it and at least one more"
            )
        arrival = self.arrival()
        request = Request(
            id=request_id,
            text=text,
            prompt_token_ids=token_ids,
            params=params,
            priority=priority,
            arrival=arrival,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_token_ids=self._parts.end_token_ids,
            metrics=RequestMetrics(arrival_time=time.monotonic()),
            bad_words=self.bad_words(params),
            grammar=self.grammar(params),
            cache_salt=_cache_salt(prompt, params, arrival),
        )
        seed = _seed(self._seed, arrival) if params.seed is None else params.seed
        request.sequences = [
            Sequence(request, index, seed + index, self.text(token_ids, params))
            for index in range(1 if params.use_beam_search else params.num_sequences)
        ]
        if params.use_beam_search:
            request.beams = BeamGroup(request.sequences[0])
        return request

    def arrival(self) -> int:
        """The number of a request that arrives now."""
        return next(self._arrivals)

    def bad_words(self, params: SamplingParams) -> list[list[int]]:
        """A request's bad words as tokens: each as it begins a text, and behind a space.

        Raises:
            RequestError: there is no tokenizer.
        """
        if not params.bad_words:
            return []
        tokenizer = self._parts.tokenizer
        if tokenizer is None:
            raise RequestError("bad_words need a tokenizer; this engine serves token ids only", param="bad_words")
        texts = [before + word.lstrip() for word in params.bad_words for before in ("", " ")]
        encoded = {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts}
        return [list(token_ids) for token_ids in sorted(encoded) if token_ids]

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """What a request's texts have to be; None for anything.

        Raises:
            RequestError: it is no grammar, or there is no tokenizer.
        """
        if params.grammar is None:
            return None
        if self._grammars is None:
            raise RequestError("a grammar needs a tokenizer; this engine serves token ids only", param="grammar")
        return self._grammars.grammar(params.grammar)

    def to_read(self, params: SamplingParams) -> Callable[[], object] | None:
        """What `grammar` would read first, and which raises as it does; None where nothing is to be read."""
        if params.grammar is None or self._grammars is None or self._grammars.is_ready:
            return None
        return self._grammars.read_vocabulary

    def text(self, token_ids: list[int], params: SamplingParams) -> TextStream | None:
        """What turns a sequence's tokens into text; None without a tokenizer."""
        if self._parts.tokenizer is None:
            return None
        return TextStream(self._parts.tokenizer, token_ids, params)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text: object = prompt if isinstance(prompt, str) else None
        ids: object = None if isinstance(prompt, str | Mapping) else prompt
        if isinstance(prompt, Mapping):
            lost = next((name for name in prompt if name not in _PROMPT_KEYS and prompt.get(name)), None)
            if lost is not None:
                raise RequestError(
                    f"this engine takes text only, and a prompt's {lost!r} would be lost; leave it out",
                    param="prompt",
                )
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is not None and isinstance(ids, Iterable) and not isinstance(ids, str | bytes):
            text, token_ids = None, [_token_id(item) for item in ids]
        elif not isinstance(text, str):
            raise RequestError(
                'a prompt is a text, token ids, {"prompt": text} or {"prompt_token_ids": [...]}, '
                f"not {type(prompt).__name__}",
                param="prompt",
            )
        elif self._parts.tokenizer is None:
            raise RequestError("this engine has no tokenizer: send prompt_token_ids", param="prompt")
        else:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"the prompt is no Unicode text: {error}", param="prompt") from error
            token_ids = self._parts.tokenizer.encode(text)
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        wrong = next((t for t in token_ids if type(t) is not int or not 0 <= t < self._parts.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"{wrong!r} is not a token id of this model: they run from 0 to {self._parts.vocab_size - 1}",
                param="prompt",
            )
        return text, token_ids


def _token_id(item: object) -> Any:
    """A token id of numpy's or torch's as Python's own number; what is none stays as it is, to be refused."""
    try:
        return item if isinstance(item, bool) else operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        return item


def salt_of(cache_salt: str) -> str:
    """What the KV cache knows a caller's salt as; no request's own is the same."""
    return f"salt:{cache_salt}"


def _cache_salt(prompt: Prompt, params: SamplingParams, arrival: int) -> str:
    """What separates the request's prefixes from others'.

    One that wants its prompt's log probabilities shares with nobody: they come with computing the prompt.
    """
    salt = prompt.get("cache_salt", "") if isinstance(prompt, Mapping) else ""
    if not isinstance(salt, str):
        raise RequestError(f"cache_salt must be a string, not {salt!r}", param="cache_salt")
    return salt_of(salt) if params.prompt_logprobs is None else f"request:{arrival}"


def _seed(engine_seed: int, arrival: int) -> int:
    """A seed for a request that brought none, the same in every run with the same engine seed."""
    digest = hashlib.blake2b(f"{engine_seed}:{arrival}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)
