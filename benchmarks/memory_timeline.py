"""Reserved against mapped memory over a run: what static reservation would hold, what is mapped, what holds tokens.

python benchmarks/memory_timeline.py --model demo --out docs/memory.svg
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib as mpl

from benchmarks.workloads import w1
from vattention.config import EngineConfig
from vattention.engine.engine import LLMEngine
from vattention.sampling_params import SamplingParams

mpl.use("svg")
from matplotlib import pyplot as plt  # the back end is chosen before

MIB = 2**20
RESULTS = Path(__file__).resolve().parent / "results"


def record(model: str, max_model_len: int, max_num_seqs: int) -> list[dict[str, float]]:
    """Run workload w1, and note the accounts after every step."""
    config = EngineConfig(model=model, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    engine = LLMEngine.from_config(config)
    row_nbytes = engine.manager.accounts().reserved_nbytes / max_num_seqs
    for index, request in enumerate(w1()):
        params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
        engine.add_request(str(index), {"prompt_token_ids": request["prompt_token_ids"]}, params)
    start = time.perf_counter()
    samples = []
    while engine.has_unfinished_requests():
        engine.step()
        statistics = engine.statistics()
        accounts = statistics.accounts
        samples.append(
            {
                "time_s": time.perf_counter() - start,
                "static_mib": statistics.num_running * row_nbytes / MIB,
                "mapped_mib": accounts.mapped_nbytes / MIB,
                "live_mib": accounts.live_nbytes / MIB,
                "token_mib": accounts.token_nbytes / MIB,
            }
        )
    engine.manager.drop_warm()
    accounts = engine.manager.accounts()
    samples.append(
        dict.fromkeys(("static_mib", "live_mib", "token_mib"), 0.0)
        | {"time_s": time.perf_counter() - start, "mapped_mib": accounts.mapped_nbytes / MIB}
    )
    engine.close()
    return samples


def draw(samples: list[dict[str, float]], title: str, out: Path) -> None:
    times = [sample["time_s"] for sample in samples]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for key, label, colour in (
        ("static_mib", "reserved up front, as contiguous caches used to be", "#d0d4da"),
        ("mapped_mib", "mapped here, warm pages included", "#7aa6d8"),
        ("token_mib", "holds tokens", "#1f4e8c"),
    ):
        axes.fill_between(times, [sample[key] for sample in samples], label=label, color=colour, step="post")
    axes.set(xlabel="seconds", ylabel="MiB of physical memory", title=title, xlim=(0, times[-1]), ylim=(0, None))
    axes.legend(loc="center", facecolor="white", framealpha=1, edgecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("docs/memory.svg"))
    arguments = parser.parse_args()
    samples = record(arguments.model, arguments.max_model_len, arguments.max_num_seqs)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_timeline.json").write_text(json.dumps(samples) + "\n")
    title = f"64 requests on {arguments.model}, context {arguments.max_model_len:,}, {arguments.max_num_seqs} slots"
    draw(samples, title, arguments.out)


if __name__ == "__main__":
    main()
