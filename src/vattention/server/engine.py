"""What the server asks of an engine and its tokenizer: `AsyncEngine` as seen from here, without tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from vattention.core import Prompt
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vattention.config import EngineConfig
    from vattention.engine.stats import EngineStatistics, StatsListener


class OutputStream(Protocol):
    """One request's cumulative outputs. `aclose` aborts it and frees its memory."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> RequestOutput: ...

    async def aclose(self) -> None: ...


class TextTokenizer(Protocol):
    """Text to token ids and back; safe to call from several threads."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]: ...

    def chat_template_source(self, template: str | None = None, *, with_tools: bool = False) -> str: ...

    def chat_stop_strings(self, template: str | None = None) -> tuple[str, ...]: ...


class ServedEngine(Protocol):
    """An engine that answers requests. `make_ready` and `submit` raise as `AsyncEngine`'s."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def tokenizer(self) -> TextTokenizer | None: ...

    @property
    def default_sampling(self) -> Mapping[str, Any]: ...

    @property
    def healthy(self) -> bool: ...

    async def make_ready(self, params: SamplingParams) -> None: ...

    def submit(self, prompt: Prompt, params: SamplingParams, *, priority: int = 0) -> OutputStream: ...

    def statistics(self) -> EngineStatistics: ...

    def add_listener(self, listener: StatsListener) -> None: ...

    async def drain(self, timeout_s: float) -> None: ...

    def shutdown(self) -> None: ...
