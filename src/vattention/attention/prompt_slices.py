"""What kernels for prompts share that load keys in whole tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vattention.attention.sequences import Sequences, SplitKernel
from vattention.core import AttentionSpec
from vattention.kv.manager import LayerView


class PromptSlices(SplitKernel[LayerView]):
    """Prompts over contiguous slots, a call for each on just the keys it reads.

    Such kernels mask what they load beyond a tensor's end, but behind the end of a sequence there may be no memory.
    So they get slices that end there, and decoding is left to kernels that read exactly (`PromptsApart`): it is
    bound by memory, not by arithmetic, and loses nothing.
    """

    reads = LayerView

    def attend(
        self,
        query: torch.Tensor,
        view: LayerView,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        return each_prompt(query, view, chosen, partial(self.prompt, spec=spec, sinks=sinks))

    def prompt(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[n, num_heads, value_dim] of the last n of k tokens.

        Args:
            query: [n, num_heads, key_dim], n at least 2.
            keys, values: [k, num_kv_heads, dim], from the first that a row sees to the last row's own.
            window: tokens that each row sees, its own among them; None for all.
            sinks: [num_heads], where the layer has any.
        """
        raise NotImplementedError


Prompt = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int | None], torch.Tensor]
"""Query, keys, values and window, as of `PromptSlices.prompt`."""


def each_prompt(query: torch.Tensor, view: LayerView, chosen: Sequences, compute: Prompt) -> torch.Tensor:
    """One call for each sequence, on just the keys it reads."""
    outputs = []
    for (slot, first_row, num_rows, start), begin in zip(chosen.own_spans, chosen.begins, strict=True):
        end = start + num_rows
        rows = query[first_row : first_row + num_rows]
        is_cut = chosen.window is not None and end - begin > chosen.window
        window = chosen.window if is_cut else None
        outputs.append(compute(rows, view.keys[slot, begin:end], view.values[slot, begin:end], window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
