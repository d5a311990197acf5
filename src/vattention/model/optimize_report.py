"""What became of a model's modules, and of the memory of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class OptimizeReport:
    """What `optimize` did.

    Attributes:
        replaced: how many modules now run each way: a linear method's name, "attention", "gated mlp" or "rms norm".
        kept: linear layers that stay as they were because nothing here is faster.
        refused: names of modules whose replacement gave other results; they stay as they were.
        nbytes: memory of all weights afterwards, with the screen.
        screen_nbytes: memory of the output layer's screen; 0 where there is none.
        copied_nbytes: memory that lasts beyond the model's own: packed weights whose original others share, and the
            screen.
        peak_copied_nbytes: the most there was at any time, with originals about to be dropped.
        elapsed_s: time it took.
    """

    replaced: dict[str, int]
    kept: int
    refused: tuple[str, ...]
    nbytes: int
    screen_nbytes: int
    copied_nbytes: int
    peak_copied_nbytes: int
    elapsed_s: float

    def with_screen(self, nbytes: int) -> OptimizeReport:
        """The same, and a screen: one is made where a model runs, once its logits are known as a plain product."""
        copied_nbytes = self.copied_nbytes + nbytes
        return replace(
            self,
            nbytes=self.nbytes + nbytes,
            screen_nbytes=nbytes,
            copied_nbytes=copied_nbytes,
            peak_copied_nbytes=max(self.peak_copied_nbytes, copied_nbytes),
        )


class Account:
    """Of a model that is being optimized: made before anything is replaced.

    Attributes:
        replaced, kept, refused: as in `OptimizeReport`, so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._num_holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        self.replaced: Counter[str] = Counter()
        self.kept = 0
        self.refused: list[str] = []
        self._packed_nbytes = 0
        self._copied_nbytes = 0
        self._peak_copied_nbytes = 0

    def pack(self, originals: Iterable[Tensor], nbytes: int, merged_nbytes: int = 0) -> None:
        """Counts a packed copy of `originals`, which are dropped unless other modules hold them.

        Args:
            merged_nbytes: of a form between, dropped once the packed one is there.
        """
        self._peak_copied_nbytes = max(self._peak_copied_nbytes, self._copied_nbytes + nbytes + merged_nbytes)
        self._packed_nbytes += nbytes
        freed = sum(weight.nbytes for weight in originals if self._num_holders[id(weight)] == 1)
        self._copied_nbytes += max(0, nbytes - freed)

    def report(self, elapsed_s: float) -> OptimizeReport:
        return OptimizeReport(
            dict(self.replaced),
            self.kept,
            tuple(self.refused),
            self._packed_nbytes + sum(parameter.nbytes for parameter in self._model.parameters()),
            0,
            self._copied_nbytes,
            self._peak_copied_nbytes,
            elapsed_s,
        )
