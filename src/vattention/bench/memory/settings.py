"""What a run of the benchmark is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Attributes:
    model: served live: "demo", a Hugging Face id, a local folder, or a GGUF file.
    seed: of lengths, arrivals and beams.
    scale: of the number of requests: more of them take longer, and scatter less.
    """

    model: str = "demo"
    seed: int = 0
    scale: float = 1.0

    def count(self, num_requests: int) -> int:
        return max(round(num_requests * self.scale), 4)
