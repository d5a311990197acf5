"""Prompts by one kernel, decoding by another: what is best for one may be slow or not capturable for the other."""

from __future__ import annotations

import torch

from vattention.attention.sequences import Sequences, SplitKernel, View
from vattention.core import AttentionSpec


class PromptsApart(SplitKernel[View]):
    """Two kernels as one.

    Args:
        prompts: for sequences that bring many rows.
        decoders: for those that bring one, the best first.
    """

    def __init__(
        self, name: str, reads: type[View], prompts: SplitKernel[View], decoders: tuple[SplitKernel[View], ...]
    ) -> None:
        self.name = name
        self.reads = reads
        self._prompts = prompts
        self._decoders = decoders
        self.uncapturable = next((kernel.uncapturable for kernel in decoders if kernel.uncapturable), None)

    def unsupported(self, spec: AttentionSpec, view: View) -> str | None:
        reason = self._prompts.unsupported(spec, view)
        if reason is None and self._decoder(spec, view) is None:
            return "no kernel beside it can decode such a layer"
        return reason

    def attend(
        self,
        query: torch.Tensor,
        view: View,
        chosen: Sequences,
        spec: AttentionSpec,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if not chosen.is_decode:
            return self._prompts.attend(query, view, chosen, spec, sinks)
        decoder = self._decoder(spec, view)
        if decoder is None:
            raise RuntimeError("nothing can decode such a layer: `unsupported` says so beforehand")
        return decoder.attend(query, view, chosen, spec, sinks)

    def _decoder(self, spec: AttentionSpec, view: View) -> SplitKernel[View] | None:
        return next((kernel for kernel in self._decoders if kernel.unsupported(spec, view) is None), None)
