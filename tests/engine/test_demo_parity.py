"""The demo model in bfloat16 says what transformers says, up to ties that rounding decides."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from vattention.llm import LLM
from vattention.model.demo import PACKAGE, demo_folder
from vattention.sampling_params import SamplingParams

pytest.importorskip(PACKAGE)

NUM_TOKENS = 32

NEAR_TIE = 0.5
"""Logits of the demo model are around 20, where neighbouring bfloat16 numbers are 0.125 apart."""

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "Water boils at a temperature of",
    "In 1969, the first human being",
    "def fibonacci(n):\n",
    "The recipe calls for two eggs, a cup of flour and",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "Photosynthesis is the process by which plants",
    "Shakespeare wrote many plays, among them",
    "To install the package, run",
    "The largest planet in our solar system is",
    "Question: What is the square root of 144?\nAnswer:",
    "Der schnellste Weg nach Berlin ist",
    "La ville de Paris est connue pour",
    "import numpy as np\n\nx = np.",
    "The stock market fell sharply today after",
    "She opened the door and saw",
    "A haiku about autumn:\n",
]


@torch.inference_mode()
def test_twenty_prompts_agree_up_to_near_ties() -> None:
    with LLM("demo", max_model_len=512) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(demo_folder(progress=False), dtype=torch.bfloat16).eval()
    others = 0
    for output in outputs:
        prompt, ours = output.prompt_token_ids, torch.tensor(output.outputs[0].token_ids)
        # One forward over all tokens instead of 32 of one: row i is what greedy decoding chooses token i + 1 from.
        tokens = torch.tensor([[*prompt, *ours[:-1].tolist()]])
        logits = model(tokens, use_cache=False, logits_to_keep=NUM_TOKENS).logits[0].float()
        gaps = logits.max(dim=-1).values - logits.gather(1, ours[:, None])[:, 0]
        worst = int(gaps.argmax())
        assert gaps[worst] <= NEAR_TIE, f"{output.prompt!r}, token {worst}: the logits differ by {gaps[worst]}"
        others += int((gaps > 0).sum())
    assert others <= len(PROMPTS) * NUM_TOKENS // 20
