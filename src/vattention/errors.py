"""Every error this package raises on purpose, as one tree.

Each message names what was needed, what there was, and which knob to turn.

    VAttentionError
    ├── ConfigError              an option is wrong, or this machine cannot do it
    ├── UnsupportedModelError    the model cannot be served correctly here
    ├── DriverError              an operating-system or CUDA call failed
    ├── OutOfMemoryError         physical memory ran short of the limit
    ├── RequestError             one request is invalid; others are not affected
    │   └── ContextLengthError   its prompt does not fit the model's context
    ├── QueueFullError           too many requests wait; try again later
    └── EngineStoppedError       the engine has shut down or died
"""

from __future__ import annotations


class VAttentionError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(VAttentionError, ValueError):
    """An option has a value that cannot work, alone or on this machine."""


class UnsupportedModelError(VAttentionError):
    """The model cannot be served correctly; the message says which property of it is the reason."""


class DriverError(VAttentionError):
    """A system call or a CUDA driver call failed for a reason other than memory shortage.

    Attributes:
        operation: the call, such as ``"mmap"`` or ``"cuMemMap"``.
        code: errno or CUresult.
    """

    def __init__(self, operation: str, code: int, detail: str) -> None:
        super().__init__(f"{operation} failed with code {code}: {detail}")
        self.operation = operation
        self.code = code


class OutOfMemoryError(VAttentionError):
    """Physical memory for the KV cache ran short.

    Attributes:
        needed_nbytes: what the failed call asked for.
        available_nbytes: what it could have had.
    """

    def __init__(self, needed_nbytes: int, available_nbytes: int, detail: str) -> None:
        super().__init__(f"{detail}: needed {needed_nbytes:,} bytes, {max(available_nbytes, 0):,} bytes available")
        self.needed_nbytes = needed_nbytes
        self.available_nbytes = available_nbytes


class RequestError(VAttentionError, ValueError):
    """One request is invalid.

    Attributes:
        param: the name of the offending parameter, or None.
        code: a short machine-readable reason, as OpenAI's API has it, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt, or prompt plus requested tokens, exceed the model's context length."""

    def __init__(self, message: str, *, param: str = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class QueueFullError(VAttentionError):
    """The waiting queue is at its bound.

    Attributes:
        retry_after_s: a guess at when trying again makes sense, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStoppedError(VAttentionError):
    """The engine has been shut down, or its thread died; the cause is chained."""
