"""CUDA graphs on a processor, as strict as real ones: a tape of operations over the very tensors of the capture.

A replay runs no Python of the captured function, so numbers on the host are what they were then; and it finds NaN
in whatever was not written since it began, but for tensors that were there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.attention.fake_libraries import attention
from vattention.attention.eager import EagerKernel
from vattention.attention.gathered import GatheredKernel
from vattention.attention.kernel import RaggedBatch
from vattention.attention.sequences import Sequences, SplitKernel
from vattention.core import AttentionSpec
from vattention.kv.manager import CacheView, LayerView, PagedLayerView
from vattention.model.cuda_graphs import Replay

aten = torch.ops.aten

_WAITS = (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal)
"""What asks the device for numbers, which nothing may do while it is captured."""

_ALLOCATES = (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided)


class FakeCapture:
    """`Capture` on a processor.

    Attributes:
        num_replays: of all graphs.
        fails: raised by captures from now on.
    """

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0
        self.fails: Exception | None = None
        self._tape: _Tape | None = None

    in_use_nbytes = 0

    def __call__(self, function: Callable[[], object]) -> Replay:
        function()
        if self.fails is not None:
            raise self.fails
        tape = self._tape = _Tape()
        try:
            with tape:
                function()
        finally:
            self._tape = None
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            with torch.inference_mode():
                tape.replay()

        return replay

    def opaque(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel: what it does inside is none of the tape's business."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            if self._tape is None:
                return function(*arguments, **keywords)
            with _disable_current_modes():
                result = function(*arguments, **keywords)
            self._tape.record(function, arguments, keywords, result)
            return result

        return call


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[torch.Tensor] = []
        self._steps: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        masks = packet in (aten.index, aten.index_put_) and any(t.dtype == torch.bool for t in _tensors(args[1]))
        from_host = packet is aten.lift_fresh and args[0].numel() > 1
        if packet in _WAITS or masks or from_host:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs)
        if packet in _ALLOCATES:
            self._made.append(result)
        else:
            self.record(func, args, kwargs, result)
        return result

    def record(self, function: Any, arguments: Any, keywords: Any, result: Any) -> None:
        known = {_storage(tensor) for tensor in _tensors((arguments, keywords))}
        results = _tensors(result)
        fresh = [tensor for tensor in results if _storage(tensor) not in known]
        is_view = bool(results) and not fresh and not _writes(function)
        if is_view:
            return
        self._made += fresh

        def step() -> None:
            again = _tensors(function(*arguments, **keywords))
            for old, new in zip(results, again, strict=True):
                if _storage(old) not in known:
                    old.copy_(new)

        self._steps.append(step)

    def replay(self) -> None:
        for tensor in self._made:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 6)
        for step in self._steps:
            step()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _writes(function: Any) -> bool:
    schema = getattr(function, "_schema", None)
    return schema is None or bool(schema.is_mutable)


class DeviceKernel(SplitKernel[CacheView]):
    """Attention that takes a decode step's numbers from tensors alone, as kernels on a GPU do.

    Args:
        reads: the kind of view.
        launched: makes a kernel of a function.
    """

    name = "device"

    def __init__(self, reads: type[CacheView], launched: Callable[[Any], Any] = lambda function: function) -> None:
        self.reads = reads
        self._decode = launched(_decode)

    def unsupported(self, spec: AttentionSpec, view: CacheView) -> str | None:
        return "no sinks" if spec.has_sinks else None

    def attend(
        self,
        query: torch.Tensor,
        view: CacheView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if chosen.is_decode:
            numbers = chosen.slots, chosen.first_keys, chosen.end_keys
            output: torch.Tensor = self._decode(query, view, *numbers, spec)
            return output
        batch = RaggedBatch(chosen.own_spans)
        if isinstance(view, LayerView):
            return EagerKernel()(query, view, batch, spec, None)
        return GatheredKernel()(query, view, batch, spec, None)


def _decode(
    query: torch.Tensor,
    view: CacheView,
    slots: torch.Tensor,
    first_keys: torch.Tensor,
    end_keys: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Each sequence's one row."""
    rows: Iterable[tuple[int, int, int]] = zip(slots.tolist(), first_keys.tolist(), end_keys.tolist(), strict=True)
    outputs = []
    for row, (slot, first, end) in enumerate(rows):
        if isinstance(view, PagedLayerView):
            keys, values = view.read(slot, torch.arange(first, end))
        else:
            keys, values = view.keys[slot, first:end], view.values[slot, first:end]
        softcap = spec.softcap or 0.0
        own = query[row : row + 1]
        outputs.append(attention(own, keys, values, scale=spec.scale, left=-1, right=-1, softcap=softcap))
    return torch.cat(outputs)
