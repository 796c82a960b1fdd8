"""Time and memory of a DPO step: prefix sharing against TRL's stock trainer.

    python -m scripts.benchmark --config configs/smollm2-135m-cpu.yaml

Each measurement is a process of its own, the two trainers by turns, in the same run; of several
repeats the median counts. It takes about half an hour on two cores, prints a table, and writes
`benchmark.json` and `benchmark.png`. On a GPU the same command measures an 8B config.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("benchmark")  # before the libraries load, so that --help is answered at once

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback

from scripts import plots
from scripts.config import ROOT, Config, load_config, parse_overrides
from scripts.monitoring.steps import RunLog
from scripts.planning.flops import step_flops
from scripts.planning.lengths import lengths_of, parse_case
from scripts.planning.trial import trial_trainer
from scripts.training import assemble

# Tokens of prompt / chosen / rejected, and pairs at a time.
CASES = ["60/80/160x8", "256/100/200x4", "512/128/256x2", "1024/256/256x1", "data"]
GROWTH = {
    "prompt": ["64/100/100x2", "256/100/100x2", "512/100/100x2", "1024/100/100x2"],
    "pairs": ["128/100/100x1", "128/100/100x2", "128/100/100x4", "128/100/100x8"],
}
TRAINERS = {"trl": False, "shared": True}


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a product of two 2048 x 2048 matrices, the median of ten."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / median(seconds[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepTimer(TrainerCallback):
    """Notes the seconds of each optimiser step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        _wait(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        _wait(self.device)
        self.seconds.append(time.perf_counter() - self._start)


def measure(config: str, overrides: dict, case: str, trainer: str, profiler=None) -> dict:
    """Train a few steps in this process; seconds a step, peak memory, and the matmul limit.

    `profiler` is a context that the steps run in.
    """
    steps = 1 + measured_steps(case)  # the first warms up
    values = {"prefix_sharing": TRAINERS[trainer], "max_steps": steps, "report_to": "none"}
    values |= {"save_strategy": "no", "eval_strategy": "no", "logging_steps": 100}
    if case != "data":
        prompt, chosen, rejected, size = parse_case(case)
        values |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 1}
        values["max_length"] = prompt + max(chosen, rejected)
    cfg = load_config(config, values | overrides)
    if case == "data":
        model = assemble(cfg).trainer
    else:
        model = trial_trainer(cfg, (prompt, chosen, rejected), size * steps)
    device = model.accelerator.device
    model.remove_callback(RunLog)
    timer = StepTimer(device)
    model.add_callback(timer)
    limit = matmul_limit(device, torch.bfloat16)
    before = peak_memory(device)
    batches = iter(model.get_train_dataloader())
    with profiler or nullcontext():
        model.train()
    lengths = [lengths_of(next(batches)) for _ in range(steps)] if case == "data" else None
    if lengths is None:
        lengths = [np.tile([prompt, chosen, rejected], (size, 1))] * steps
    lora = sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    rates = [
        (len(n) / s, step_flops(model.model.config, n, lora) / s / limit)
        for n, s in zip(lengths[1:], timer.seconds[1:], strict=True)
    ]
    return {
        "pairs_per_second": median(pairs for pairs, _ in rates),
        "share_of_limit": median(share for _, share in rates),
        "peak_gb": peak_memory(device),
        "before_gb": before,
        "limit_tflops": limit / 1e12,
        "seconds": timer.seconds,
    }


def measured_steps(case: str) -> int:
    """Steps to measure in a process: real batches differ, random ones are all of a size."""
    return 3 if case == "data" else 1


# Which of torch's operations belong together, by what their names begin with.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_scaled_dot"),
    "NF4 to 16 bits": ("bitsandbytes::dequantize", "bitsandbytes::gemm"),
}


def profile(config: str, overrides: dict, case: str) -> pd.Series:
    """Where the time of a few steps with prefix sharing goes: shares by `GROUPS`, then the largest
    of the other operations."""
    profiler = torch.profiler.profile()
    measure(config, overrides, case, "shared", profiler)
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    shares = dict.fromkeys(GROUPS, 0.0)
    for key in list(times):
        for group, names in GROUPS.items():
            if key.startswith(names):
                shares[group] += times.pop(key, 0) / total
    largest = sorted(times, key=times.get, reverse=True)[:8]
    return pd.Series(shares | {key: times[key] / total for key in largest}).map("{:.1%}".format)


def peak_memory(device: torch.device) -> float:
    """The most memory so far, in GB: what torch allocated on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def run_case(config: str, overrides: dict, case: str, repeats: int) -> dict:
    """Both trainers by turns, `repeats` times, each time in a process of its own."""
    found = {name: [] for name in TRAINERS}
    for turn in range(repeats):
        for name in list(TRAINERS)[:: 1 if turn % 2 == 0 else -1]:
            job = json.dumps([config, overrides, case, name])
            done = subprocess.run(
                [sys.executable, "-m", "scripts.benchmark", "--child", job],
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
                found[name].append({"error": reason})
            else:
                found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{case:<16}{name:<8}{summary(found[name][-1])}", flush=True)
    return found


def summary(result: dict) -> str:
    """One measurement in a line."""
    if "error" in result:
        return f"failed: {result['error'][:120]}"
    return (
        f"{result['pairs_per_second']:7.2f} pairs/s  {result['peak_gb']:6.2f} GB  "
        f"{result['share_of_limit']:.0%} of {result['limit_tflops']:.2f} TFLOP/s"
    )


def table(results: dict) -> pd.DataFrame:
    """Medians of each case, and the ratios of prefix sharing to TRL."""
    rows = {}
    for case, found in results.items():
        row = {}
        for name, runs in found.items():
            runs = [run for run in runs if "error" not in run]
            for key in ("pairs_per_second", "peak_gb", "share_of_limit"):
                row[f"{key} {name}"] = median(r[key] for r in runs) if runs else float("nan")
        row["speed"] = row["pairs_per_second shared"] / row["pairs_per_second trl"]
        row["memory"] = row["peak_gb shared"] / row["peak_gb trl"]
        rows[case] = row
    return pd.DataFrame(rows).T


def machine(cfg: Config) -> str:
    """What it ran on."""
    if cfg.dpo.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def main(args: argparse.Namespace) -> None:
    if args.child:
        print(json.dumps(measure(*json.loads(args.child))))
        return
    args.cases = args.cases or CASES
    for case in args.cases:
        if case != "data":
            parse_case(case)
    overrides = parse_overrides(args.overrides)
    if args.profile:
        print(profile(args.config, overrides, args.profile).to_string())
        return
    cfg = load_config(args.config, overrides)
    folder = Path(args.output_dir or "outputs/benchmark")
    results = {"machine": machine(cfg), "config": args.config, "cases": {}, "growth": {}}
    for name in args.formats:
        more = overrides | {"load_in_4bit": name == "nf4"}
        for case in args.cases:
            found = run_case(args.config, more, case, args.repeats)
            results["cases"][f"{name} {case}"] = found
            save(results, folder)
    for axis, cases in {} if args.no_growth else GROWTH.items():
        found = {case: run_case(args.config, overrides, case, 1) for case in cases}
        results["growth"][axis] = found
        save(results, folder)
    plots.save(plots.benchmark(results), folder / "benchmark.png")
    print(f"\n{results['machine']}, medians of {args.repeats}; speed and memory: shared / trl")
    print(table(results["cases"]).round(2).to_string())
    print(f"\n{folder / 'benchmark.json'}, {folder / 'benchmark.png'}")


def save(results: dict, folder: Path) -> None:
    """Keep what is measured so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    cli.command(main, ARGS)
