"""What the papers report, to stand beside our figures.

PagedAttention (arXiv 2309.06180): figure 2 for shares of memory, figure 13 for requests batched, figure 15 and
section 6.3 for sharing, figure 16 for prefixes; OPT-13B on an A100 with 40 GB.
"""

from __future__ import annotations

TOKEN_SHARE = {"Orca (Max)": 0.204, "Orca (Pow2)": 0.268, "Orca (Oracle)": 0.382, "vLLM": 0.963}
"""Of the KV cache's memory on ShareGPT."""

BATCHED = {
    "ShareGPT-like": {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "vLLM": 30.42},
    "Alpaca-like": {"Orca (Max)": 7.00, "Orca (Pow2)": 43.24, "Orca (Oracle)": 72.75, "vLLM": 132.44},
}
"""Requests in a batch, on average, at the rates of `scenarios`."""

PARALLEL_SAVED = {
    "Alpaca-like": {2: 0.0609, 4: 0.0853, 6: 0.0979},
    "ShareGPT-like": {2: 0.162, 6: 0.305},
}
BEAM_SAVED = {
    "Alpaca-like": {2: 0.3756, 4: 0.5313, 6: 0.5516},
    "ShareGPT-like": {2: 0.443, 6: 0.663},
}
"""Memory saved by sharing blocks of 16 tokens, by samples or beams."""

PREFIX_SPEED_UP = {80: 1.67, 341: 3.58}
"""Throughput of vLLM that shares a prefix of so many tokens, against Orca (Oracle), which shares nothing."""
