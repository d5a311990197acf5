"""Beam search: which continuations of a request's beams live on, which have ended, and when no better can come.

The search is that of vLLM's `LLM.beam_search`. Every live beam proposes its 2 * width likeliest tokens. Those that
end a text complete their sequence; of the others the `width` with the highest cumulative log probability live on.
The best sequences by cumulative log probability / length ** length_penalty are returned. Why the length has to
be weighed: Wu et al., "Google's Neural Machine Translation System" (2016), section 7.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from vattention.engine.sequence import Sequence
from vattention.model.proposals import Proposals
from vattention.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Branch:
    """A live beam and one of its continuations by a token, a sequence of its own."""

    parent: Sequence
    child: Sequence


class BeamGroup:
    """The beams of one request. It knows tokens and scores; slots and memory are the scheduler's.

    Args:
        root: a sequence of the prompt alone.

    Attributes:
        width: most live beams, and sequences kept that have ended.
        live: beams that go on, likeliest first. All have the same number of tokens.
        forks: live beams that have no slot yet, each with the beam whose slot they are to fork from.
        fork_at: tokens that forks share. While there are forks, beams forked from compute no further: a window that
            moves on would give back what the fork needs.
    """

    def __init__(self, root: Sequence) -> None:
        request = root.request
        self._params: SamplingParams = request.params
        self._ends = set(self._params.stop_token_ids) | (
            set() if self._params.ignore_eos else request.end_token_ids
        )
        self._max_len = len(request.prompt_token_ids) + request.max_tokens
        self._ended: list[tuple[float, Sequence]] = []
        self.width = self._params.num_sequences
        self.live = [root]
        self.forks: list[Branch] = []
        self.fork_at = 0
        self._proposed: dict[Sequence, Proposals] = {}

    @property
    def num_proposals(self) -> int:
        """Tokens that each live beam is to propose."""
        return max(2 * self.width, self._params.logprobs or 0)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that live, likeliest first, and the best that have ended, best first."""
        return [*self.live, *(sequence for _, sequence in self._ended)]

    def num_computable(self, beam: Sequence) -> int:
        """Tokens that a beam may compute now."""
        is_source = any(fork.parent is beam for fork in self.forks)
        return self.fork_at if is_source else beam.num_tokens

    def offer(self, beam: Sequence, proposals: Proposals) -> None:
        """Take what a live beam proposes; it counts once all have proposed."""
        self._proposed[beam] = proposals

    def restart(self) -> Sequence:
        """No beam has a slot any more. Returns the one that is to compute what all have in common; the others fork
        from it, and all propose again.
        """
        self._proposed.clear()
        leader, *others = self.live
        self.forks = [Branch(leader, beam) for beam in others]
        self.fork_at = _common_prefix(self.live)
        return leader

    @property
    def ready(self) -> bool:
        """Whether every live beam has proposed."""
        return len(self._proposed) == len(self.live) > 0

    def advance(self) -> list[Branch]:
        """Go one token on, once `ready`.

        Returns:
            Beams with one child each, which is to take over their slot: none where the search is over. Beams that
            lived before this call and are not among them are dead; the other children are in `forks`, to fork from
            a child of the same parent.
        """
        proposed = [self._proposed[beam] for beam in self.live]
        self._proposed.clear()
        count = min(2 * self.width, *(len(own.token_ids) for own in proposed))
        token_ids = np.stack([own.token_ids[:count] for own in proposed])
        logprobs = np.stack([own.logprobs[:count] for own in proposed])
        totals = logprobs + np.array([[beam.cumulative_logprob] for beam in self.live])
        possible = np.isfinite(totals)
        ending = np.isin(token_ids, list(self._ends))
        parents, places = np.nonzero(possible & ending)
        for parent, place in zip(parents.tolist(), places.tolist(), strict=True):
            self._complete(self.live[parent], proposed[parent], place, float(totals[parent, place]))
        ranked = np.argsort(-np.where(possible & ~ending, totals, -np.inf), axis=None, kind="stable")
        num_living = min(self.width, int((possible & ~ending).sum()))
        children: list[Branch] = []
        for flat in ranked[:num_living].tolist():
            parent, place = divmod(flat, count)
            beam = self.live[parent]
            children.append(Branch(beam, self._child(beam, proposed[parent], place, len(children))))
        # What ends by its text or its length, which no token foretells, had a place among the living until now.
        for branch in children:
            if branch.child.finish_reason is not None:
                self._keep(self._score(branch.child, branch.child.num_tokens), branch.child)
        living = [branch for branch in children if branch.child.finish_reason is None]
        self.live = [branch.child for branch in living]
        if self._settled():
            self.live, living = [], []
        heirs: dict[Sequence, Sequence] = {}
        for branch in living:
            heirs.setdefault(branch.parent, branch.child)
        self.forks = [
            Branch(heirs[branch.parent], branch.child) for branch in living if branch.child not in heirs.values()
        ]
        self.fork_at = self._num_tokens - 1
        return [Branch(parent, child) for parent, child in heirs.items()]

    @property
    def _num_tokens(self) -> int:
        return self.live[0].num_tokens if self.live else 0

    def _complete(self, beam: Sequence, proposals: Proposals, place: int, total: float) -> None:
        """Keep the beam's continuation by a token that ends it, if it is among the best."""
        score = _score(total, beam.num_tokens, self._params.length_penalty)
        if len(self._ended) < self.width or score > self._ended[-1][0]:
            self._keep(score, self._child(beam, proposals, place, 0))

    def _keep(self, score: float, sequence: Sequence) -> None:
        insort(self._ended, (score, sequence), key=lambda entry: -entry[0])
        del self._ended[self.width :]

    def _child(self, beam: Sequence, proposals: Proposals, place: int, index: int) -> Sequence:
        child = beam.branch(index)
        child.append(proposals.choose(place, self._params.logprobs))
        return child

    def _score(self, sequence: Sequence, length: int) -> float:
        return _score(sequence.cumulative_logprob, length, self._params.length_penalty)

    def _settled(self) -> bool:
        """Whether the search is over: no beam lives, or none is to become better than those that have ended."""
        if not self.live or len(self._ended) < self.width:
            return not self.live
        worst = self._ended[-1][0]
        return all(self._score(self.live[0], length) <= worst for length in self._lengths_ahead())

    def _lengths_ahead(self) -> Iterator[int]:
        """Lengths at which the best live beam has to be too bad for the search to end.

        Cumulative log probabilities only fall, so a score is highest at the greatest length or, where the length
        penalty is negative, at the present one.
        """
        if self._params.early_stopping is not True:
            yield self._num_tokens
        if self._params.early_stopping == "never":
            yield self._max_len


def _score(cumulative_logprob: float, length: int, length_penalty: float) -> float:
    return cumulative_logprob / math.pow(length, length_penalty)


def _common_prefix(beams: Items[Sequence]) -> int:
    """Tokens that all sequences begin with; the last one of none is counted."""
    first, *others = (beam.token_ids(0, beam.num_tokens) for beam in beams)
    for position, token in enumerate(first[:-1]):
        if any(other[position] != token for other in others):
            return position
    return len(first) - 1
