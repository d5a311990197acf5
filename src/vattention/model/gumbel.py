"""Sampling as the search for a largest number: the softmax's tokens are those of logits with Gumbel noise.

The largest of logit + temperature * G, with independent G = -ln(-ln u), is a sample of the softmax of
logit / temperature (E. J. Gumbel, "Statistical Theory of Extreme Values and Some Practical Applications", 1954;
C. Maddison et al., "A* Sampling", 2014, section 2). So a sampled token costs no more than a greedy one: no
probabilities are computed, and where the compiled kernels make the logits, none are stored.

u is a hash of a row's key and the token's id, and the noise is computed by integers and by single operations that
round to float32. So the compiled kernels and the tensor operations here give the same to the last bit, on any
device.
Noise and logits are added in float32: what is less than 2^-24 of a logit, at low temperatures, is not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vattention.native import Largest, Noise, kernels
from vattention.native.structures import NOISE

_HOTTEST = 1e30
"""The highest temperature: beyond it all tokens are equally likely, and noise would not fit into float32."""

_SPREAD = 26.1
"""The largest and the least of 2^32 numbers' noise at temperature 1 are less apart."""

_FACTORS = (-0.100823775, 0.161805004, -0.172432244, 0.199068829, -0.249712288, 0.333347142, -0.500003219, 1.0)
"""Of ln(1 + x) / x for x from sqrt(1/2) - 1 to sqrt(2) - 1, off by 2e-7 of it; highest power first."""

_LN_2 = 0.693147181
_ROOT_OF_HALF = 0x3F3504F3
"""As the bits of a float32."""


def noise_for(draws: Sequence[tuple[int, int, float]]) -> Noise | None:
    """What noise rows get; None where none gets any.

    Args:
        draws: for each row a sequence's seed, the number of its tokens, and the temperature, 0 for greedy choice.
    """
    if all(temperature == 0.0 for _, _, temperature in draws):
        return None
    noise = np.zeros(len(draws), NOISE)
    for i, (seed, index, temperature) in enumerate(draws):
        if temperature > 0.0:
            digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
            noise[i] = int.from_bytes(digest), min(temperature, _HOTTEST)
    return noise


def likeliest(logits: Tensor, noise: Noise | None = None) -> Largest:
    """Of each row of float32 [R, V] the first largest logit, with its noise, NaN counting as largest.

    Its index, and its value with the noise.
    """
    if noise is not None and len(logits) > 0:
        library = None if logits.is_cuda else kernels()
        if library is not None:
            return library.products.largest_of(logits if logits.stride(1) == 1 else logits.contiguous(), noise)
        logits = _perturbed(logits, noise)
    if logits.is_cuda:
        largest, token_ids = logits.max(dim=-1)
        return token_ids.cpu().numpy(), largest.cpu().numpy()
    array = logits.detach().numpy()
    ids = array.argmax(axis=-1)  # several times faster than torch's on a CPU
    return ids, array[np.arange(len(ids)), ids]


def _perturbed(logits: Tensor, noise: Noise) -> Tensor:
    """A copy with the noise on all logits that it can make the largest."""
    temperatures = torch.from_numpy(noise["temperature"].copy()).to(logits.device)
    least = logits.amax(dim=-1) - temperatures * _SPREAD
    rows, ids = ((logits >= least[:, None]) & (temperatures > 0.0)[:, None]).nonzero(as_tuple=True)
    keys = torch.from_numpy(noise["key"].copy().view(np.int32).reshape(-1, 2)).to(logits.device)
    perturbed = logits.clone()
    perturbed[rows, ids] += _gumbel(keys[rows, 0], keys[rows, 1], ids.int()) * temperatures[rows]
    return perturbed


def _gumbel(low: Tensor, high: Tensor, ids: Tensor) -> Tensor:
    """-ln(-ln u) in float32, for u that are hashes of keys in two halves and ids, all int32."""
    bits = _mixed(_mixed(ids ^ low) ^ high)
    # u's distance from the nearer end of [0, 1] has all its bits at both ends.
    upper = bits < 0
    distance = (torch.where(upper, ~bits, bits).float() + 0.5) * 2.0**-32
    return _negative_log(_negative_log(torch.where(upper, distance, 1.0 - distance), distance))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of A. Appleby's MurmurHash3, on words that int32 stands for."""
    x = (x ^ _shifted(x, 16)) * (0x85EBCA6B - 2**32)
    x = (x ^ _shifted(x, 13)) * (0xC2B2AE35 - 2**32)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, count: int) -> Tensor:
    return (x >> count) & ((1 << (32 - count)) - 1)


def _negative_log(x: Tensor, rest: Tensor | None = None) -> Tensor:
    """-ln x of x > 0; where x is 1 - `rest`, a `rest` that is too small for x to show counts."""
    shifted = x.view(torch.int32) - _ROOT_OF_HALF
    power = shifted >> 23
    part = ((shifted & 0x007FFFFF) + _ROOT_OF_HALF).view(torch.float32) - 1.0
    if rest is not None:
        part = torch.where(power == 0, -rest, part)
    y = torch.full_like(part, _FACTORS[0])
    for factor in _FACTORS[1:]:
        y = y * part + factor
    return -(power.float() * _LN_2 + y * part)
