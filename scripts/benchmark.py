"""Time and memory of a DPO step: prefix sharing against TRL's stock trainer.

    python -m scripts.benchmark --config configs/smollm2-135m-cpu.yaml

Each measurement is a process of its own that measures `MEASURED` steps after one to warm up, the
ways to train by turns. TRL's trainer goes through each attention implementation that it has here,
and the fastest is what prefix sharing is held against. The median of all steps counts, and the
slowest and the fastest stand beside it. It takes about 50 minutes on two cores, prints a table, and
writes `benchmark.json` and `benchmark.png`. On a GPU the same command measures an 8B config.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("benchmark")

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
from datasets import Dataset, DatasetDict
from torch.utils.benchmark import Timer
from transformers import TrainerCallback
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from trl import DPOTrainer

from scripts import plots
from scripts.base import ROOT, RecipeError
from scripts.config import Config, load_config, parse_overrides
from scripts.plan import parse_case, step_flops
from scripts.run_folder import describe_machine
from scripts.run_log import RunLog
from scripts.training import assemble

# Tokens of prompt / chosen / rejected, and pairs at a time.
CASES = ["60/80/160x8", "256/100/200x4", "512/128/256x2", "1024/256/256x1", "data"]
GROWTH = {
    "prompt": ["64/100/100x2", "256/100/100x2", "512/100/100x2", "1024/100/100x2"],
    "pairs": ["128/100/100x1", "128/100/100x2", "128/100/100x4", "128/100/100x8"],
}
SHARED = "shared"  # the way that is no attention of TRL's trainer
MEASURED = 3  # steps a process; the one before them warms up


def random_pairs(vocabulary: int, sizes: tuple[int, int, int], count: int) -> Dataset:
    """Pairs of random tokens, as TRL's trainer has them after tokenising: what a step costs does
    not depend on what they say. `sizes` are the tokens of prompt, chosen and rejected."""
    random = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {k: random.integers(0, vocabulary, n).tolist() for k, n in zip(names, sizes, strict=True)}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def trial_trainer(cfg: Config, sizes: tuple[int, int, int] | None, count: int = 0) -> DPOTrainer:
    """The trainer of `cfg` over `count` pairs of random tokens, or, without `sizes`, over its data.

    Raises:
        RecipeError: as `require_sharing`.
    """
    pairs = None
    if sizes:  # a trainer is built over pairs; what it trains on is replaced below
        pair = {
            "prompt": [{"role": "user", "content": "Is it so?"}],
            "chosen": [{"role": "assistant", "content": "Yes, it is."}],
            "rejected": [{"role": "assistant", "content": "No, not at all."}],
            "prompt_ids": [5, 6, 7],
            "chosen_ids": [8, 9],
            "rejected_ids": [10, 11],
        }
        pairs = DatasetDict(dict.fromkeys(("train", "test"), Dataset.from_list([pair])))
    run = assemble(cfg, pairs)
    run.trainer.remove_callback(RunLog)  # a trial leaves the log of a real run alone
    require_sharing(run.trainer, cfg)
    if sizes:
        run.trainer.train_dataset = random_pairs(len(run.tokenizer), sizes, count)
    return run.trainer


def require_sharing(trainer: DPOTrainer, cfg: Config) -> None:
    """Raise a `RecipeError` if the config wants prefix sharing and the trainer has refused it: what
    is measured as prefix sharing must not have gone TRL's way."""
    refusal = getattr(trainer, "refusal", None)
    if cfg.recipe.prefix_sharing and refusal:
        raise RecipeError(f"nothing is measured: {refusal}; set prefix_sharing=false")


def lengths_of(batch: dict) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of a batch of TRL's collator, (pairs, 3)."""
    answers = batch["completion_mask"].sum(1).cpu().numpy()
    whole = batch["attention_mask"].sum(1).cpu().numpy()
    half = len(answers) // 2
    return np.stack([(whole - answers)[:half], answers[:half], answers[half:]], axis=1)


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a product of two large square matrices, the median of many."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange().median


def computed_dtype(trainer: DPOTrainer) -> torch.dtype:
    """What the products of a step are computed in: autocast's type, else that of the weights."""
    if trainer.args.bf16 or trainer.args.fp16:
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    return trainer.model.get_input_embeddings().weight.dtype


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trl_attentions() -> list[str]:
    """The attention implementations of transformers that this machine has."""
    two, three = is_flash_attn_2_available(), is_flash_attn_3_available()
    return ["eager", "sdpa", *["flash_attention_2"] * two, *["flash_attention_3"] * three]


class StepRecorder(TrainerCallback):
    """Notes each optimiser step of `trainer`: its seconds, and the pairs that it went through.

    With gradient accumulation a step takes several batches; all of them count.
    """

    def __init__(self, trainer: DPOTrainer) -> None:
        self.device = trainer.accelerator.device
        self.seconds: list[float] = []
        self._batches: list[list[dict[str, torch.Tensor]]] = []
        train_on = trainer.training_step

        def noting(model, inputs, *args, **kwargs):
            # Only kept here; counting tokens would wait for the GPU in the middle of a step.
            masks = {k: inputs[k] for k in ("completion_mask", "attention_mask")}
            self._batches[-1].append(masks)
            return train_on(model, inputs, *args, **kwargs)

        trainer.training_step = noting
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._batches.append([])
        _wait(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        _wait(self.device)
        self.seconds.append(time.perf_counter() - self._start)

    def lengths(self) -> list[np.ndarray]:
        """Of each step (pairs, 3): the tokens of prompt, chosen and rejected of all its pairs."""
        return [np.concatenate([lengths_of(one) for one in step]) for step in self._batches]


def measure(config: str, overrides: dict, case: str, attention: str | None, profiler=None) -> dict:
    """Train a few steps in this process: TRL's trainer with the implementation `attention`, or,
    without it, prefix sharing. `profiler` is a context that the steps run in.

    Returns:
        `pairs_per_second` and `share_of_limit` (of the rate of one large product), medians over the
        measured steps; each step's `rates` in pairs a second, `step_pairs` and `seconds`; peak
        memory in GB.
    """
    steps = 1 + MEASURED
    values = {"prefix_sharing": attention is None, "max_steps": steps, "report_to": "none"}
    values |= {"save_strategy": "no", "eval_strategy": "no", "logging_steps": 100}
    values |= {"attn_implementation": attention} if attention else {}
    sizes, count = None, 0
    if case != "data":
        *sizes, count = parse_case(case)
        values |= {"per_device_train_batch_size": count, "gradient_accumulation_steps": 1}
        # Nothing is cut: neither these pairs, nor the one that the trainer is built with.
        values["max_length"] = max(sizes[0] + max(sizes[1:]), 256)
    trainer = trial_trainer(load_config(config, overrides | values), sizes, count * steps)
    device = trainer.accelerator.device
    recorder = StepRecorder(trainer)
    limit = matmul_limit(device, computed_dtype(trainer))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # loading's peak is no step's
    with profiler or nullcontext():
        trainer.train()
    lora = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    measured = list(zip(recorder.lengths(), recorder.seconds, strict=True))[1:]
    rates = [len(pairs) / seconds for pairs, seconds in measured]
    flops = [step_flops(trainer.model.config, pairs, lora) / s for pairs, s in measured]
    return {
        "pairs_per_second": median(rates),
        "share_of_limit": median(flops) / limit,
        "rates": rates,
        "step_pairs": [len(pairs) for pairs, _ in measured],
        "seconds": [seconds for _, seconds in measured],
        "peak_gb": peak_memory(device),
        "limit_tflops": limit / 1e12,
    }


def profile(config: str, overrides: dict, case: str) -> str:
    """torch's table of where the time of a few steps with prefix sharing goes."""
    profiler = torch.profiler.profile()
    measure(config, overrides, case, None, profiler)
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12)


def peak_memory(device: torch.device) -> float:
    """The most memory so far, in GB: what torch allocated on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1024**3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def run_case(config: str, overrides: dict, case: str, repeats: int) -> dict[str, list[dict]]:
    """Every way to train by turns, `repeats` times, each time in a process of its own.

    Returns:
        What `measure` gave (or the `error`) by way: `shared`, and each attention that TRL has here.
    """
    ways: dict[str, list[dict]] = {name: [] for name in (*trl_attentions(), SHARED)}
    for turn in range(repeats):
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            attention = None if name == SHARED else name
            ways[name].append(_in_a_process([config, overrides, case, attention]))
            label = name if name == SHARED else f"trl, {name}"
            print(f"{case:<16}{label:<24}{benchmark_summary(ways[name][-1])}", flush=True)
    return ways


def against_best(ways: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """`shared` and `trl`, the latter with the attention whose median rate is the highest.

    An attention that failed in every process counts as a rate of 0.
    """
    tried = {name: runs for name, runs in ways.items() if name != SHARED}
    best = max(tried, key=lambda name: median(all_rates(tried[name]) or [0]))
    runs = [run | {"attention": best} for run in tried[best]]
    return {"trl": runs, SHARED: ways[SHARED]}


def _in_a_process(job: list) -> dict:
    """`measure(*job)` in a process of its own, or the `error` that it ended with."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmark", "--child", json.dumps(job)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def all_rates(runs: list[dict]) -> list[float]:
    """Pairs a second of every measured step of every run that did not fail."""
    return [rate for run in runs for rate in run.get("rates", [])]


def benchmark_summary(result: dict) -> str:
    """One measurement in a line."""
    if "error" in result:
        return f"failed: {result['error'][:120]}"
    low, high = min(result["rates"]), max(result["rates"])
    return (
        f"{result['pairs_per_second']:7.2f} pairs/s ({low:.2f}-{high:.2f})  "
        f"{result['peak_gb']:6.2f} GB  "
        f"{result['share_of_limit']:.0%} of {result['limit_tflops']:.2f} TFLOP/s"
    )


def table(results: dict) -> pd.DataFrame:
    """A row a case: medians, slowest to fastest step, and the ratios of prefix sharing to TRL."""
    rows = {}
    for case, found in results.items():
        row = {"TRL attention": found["trl"][0]["attention"]}
        for name in ("trl", SHARED):
            runs = [run for run in found[name] if "error" not in run]
            rates = all_rates(runs) or [float("nan")]
            row[f"pairs_per_second {name}"] = median(rates)
            row[f"range {name}"] = f"{min(rates):.2f}-{max(rates):.2f}"
            for key in ("peak_gb", "share_of_limit"):
                row[f"{key} {name}"] = median(r[key] for r in runs) if runs else float("nan")
        row["speed"] = row["pairs_per_second shared"] / row["pairs_per_second trl"]
        row["memory"] = row["peak_gb shared"] / row["peak_gb trl"]
        rows[case] = row
    return pd.DataFrame.from_dict(rows, orient="index")


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
        print(profile(args.config, overrides, args.profile))
        return
    load_config(args.config, overrides)  # mistakes show before a process starts
    folder = Path(args.output_dir or "outputs/benchmark")
    results = {"machine": describe_machine()["device"], "config": args.config}
    results |= {"cases": {}, "growth": {}, "tried": {}}  # `tried`: every attention of TRL's
    for name in args.formats:
        more = overrides | {"load_in_4bit": name == "nf4"}
        for case in args.cases:
            ways = run_case(args.config, more, case, args.repeats)
            results["tried"][f"{name} {case}"] = ways
            results["cases"][f"{name} {case}"] = against_best(ways)
            save_results(results, folder)
    for axis, cases in {} if args.no_growth else GROWTH.items():
        ways = {case: run_case(args.config, overrides, case, 1) for case in cases}
        results["growth"][axis] = {case: against_best(found) for case, found in ways.items()}
        save_results(results, folder)
    plots.save(plots.benchmark_chart(results), folder / "benchmark.png")
    steps = f"{args.repeats} processes of {MEASURED} steps"
    print(f"\n{results['machine']}, medians of {steps}; speed and memory: shared / trl")
    print(table(results["cases"]).round(2).to_string())
    print(f"\n{folder / 'benchmark.json'}, {folder / 'benchmark.png'}")


def save_results(results: dict, folder: Path) -> None:
    """Keep what is measured so far, the `table` of it included."""
    folder.mkdir(parents=True, exist_ok=True)
    results["table"] = table(results["cases"]).to_dict("index")
    (folder / "benchmark.json").write_text(json.dumps(results, indent=1))
