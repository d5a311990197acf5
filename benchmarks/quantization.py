"""What weights in 8 and 4 bits cost and bring: products, decode steps and quality by format, formats taking turns.

    python -m benchmarks.quantization --json quantization.json    # some minutes, most of them for quality

Products walk over copies of a weight that together exceed the caches. Quality is the Kullback-Leibler divergence of
the next token's distribution from that of the weights as they came, over texts that those wrote themselves at
temperature 1, and the perplexity of these texts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.mapping import surroundings
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.model.linear import LinearMethod
from vattention.model.loader import load
from vattention.model.native_linear import NativeLinear
from vattention.model.optimize import optimize
from vattention.model.quantized import Int4Linear, Int8Linear
from vattention.sampling_params import SamplingParams

FORMATS: tuple[Literal["int8", "int4"] | None, ...] = (None, "int8", "int4")
METHODS: dict[str, type[LinearMethod]] = {"bfloat16": NativeLinear, "int8": Int8Linear, "int4": Int4Linear}
SHAPES = ((1536, 640), (640, 1024), (4096, 640), (640, 2048), (14336, 4096), (4096, 14336))
"""[out, in] of the demo model's layers and of a Llama 8B's feed-forward block."""
ROWS = (1, 4, 16, 64, 512)
COPIES_NBYTES = 96_000_000
PROMPTS = (
    "The history of the steam engine begins",
    "To bake bread you need",
    "def quicksort(items):",
    "Once upon a time in a small village",
    "The derivative of a function measures",
    "Dear Sir or Madam,",
    "The capital cities of Europe are",
    "In quantum mechanics, a particle",
)


def products(num_out: int, num_in: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Times of one product by rows and format, and how fast it reads the weight."""
    copies = max(1, COPIES_NBYTES // (num_out * num_in * 2))
    weights = [torch.randn(num_out, num_in).bfloat16() for _ in range(copies)]
    packed = {name: [method.pack(weight, None) for weight in weights] for name, method in METHODS.items()}
    for rows in ROWS:
        x = torch.randn(rows, num_in).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in packed}
        begin, turn = time.perf_counter(), 0
        while turn < 5 or time.perf_counter() - begin < seconds:
            for name, methods in packed.items():
                start = time.perf_counter()
                for method in methods:
                    method(x)
                times[name].append((time.perf_counter() - start) / copies)
            turn += 1
        for name, values in times.items():
            median = statistics.median(values)
            yield {
                "shape": [num_out, num_in],
                "rows": rows,
                "format": name,
                "median_s": median,
                "least_s": min(values),
                "read_gb_per_s": packed[name][0].nbytes / median / 1e9,
            }


def steps(model: str, batch: int, context: int, num_turns: int) -> list[dict[str, Any]]:
    """Times of decode steps of `batch` sequences of about `context` tokens, by format."""
    engines = {}
    params = SamplingParams(temperature=0, max_tokens=num_turns + 8, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 5000, (batch, context), generator=generator).tolist()
    for quantization in FORMATS:
        config = EngineConfig(model=model, quantization=quantization, skip_tokenizer_init=True, max_num_seqs=batch)
        engine = LLMEngine.from_config(config)
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        while not all(output.outputs[0].token_ids for output in engine.step()):
            pass
        engines[quantization or "bfloat16"] = engine
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(num_turns):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.step()
            times[name].append(time.perf_counter() - start)
    for engine in engines.values():
        engine.close()
    return [
        {"batch": batch, "context": context, "format": name, "median_s": statistics.median(values)}
        for name, values in times.items()
    ]


def texts_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """What the model writes at temperature 1."""
    torch.manual_seed(0)
    generate = cast(Any, model).generate
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    return [
        generate(torch.tensor([prompt]), max_new_tokens=num_tokens, eos_token_id=None, **options)[0].tolist()
        for prompt in prompts
    ]


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """[length, vocabulary] of the token after each."""
    logits: Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), -1)


def quality(model: str, num_tokens: int) -> Iterator[dict[str, Any]]:
    """Divergence from the weights as they came, and perplexity, by format."""
    original = load(EngineConfig(model=model))
    assert original.tokenizer is not None
    texts = texts_of(original.model, [original.tokenizer.encode(prompt) for prompt in PROMPTS], num_tokens)
    for quantization in FORMATS:
        own = load(EngineConfig(model=model, skip_tokenizer_init=True)).model
        report = optimize(own, quantization)
        divergences, surprises, agreements = [], [], []
        for text in texts:
            expected, found = log_probabilities(original.model, text), log_probabilities(own, text)
            divergences.append((expected.exp() * (expected - found)).sum(-1))
            agreements.append(expected.argmax(-1) == found.argmax(-1))
            surprises.append(-found[:-1].gather(1, torch.tensor(text[1:])[:, None]))
        divergence = torch.cat(divergences)
        yield {
            "format": quantization or "bfloat16",
            "weights_nbytes": report.nbytes,
            "pack_s": report.elapsed_s,
            "num_tokens": len(divergence),
            "mean_divergence_nats": float(divergence.mean()),
            "median_divergence_nats": float(divergence.median()),
            "same_likeliest_token": float(torch.cat(agreements).float().mean()),
            "perplexity": float(torch.cat(surprises).mean().exp()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", choices=("products", "steps", "quality"))
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring a product of one shape")
    parser.add_argument("--turns", type=int, default=40, help="decode steps that are measured")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=160, help="of each text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.quantization {shlex.join(sys.argv[1:])}".strip(),
        "date": date.today().isoformat(),
        "surroundings": surroundings("cpu"),
        "threads": args.threads,
    }
    sections: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "products": lambda: (row for shape in SHAPES for row in products(*shape, args.seconds)),
        "steps": lambda: (row for batch in args.batches for row in steps(args.model, batch, 256, args.turns)),
        "quality": lambda: quality(args.model, args.tokens),
    }
    for name, section in sections.items():
        if args.only in (None, name):
            results[name] = []
            for row in section():
                print(json.dumps(row), flush=True)
                results[name].append(row)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
