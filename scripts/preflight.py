"""Find out in seconds what would otherwise fail after a long download.

    python -m scripts.preflight --config configs/llama3-8b-a100.yaml

One line a check: ok, warn or FAIL, with the fix. Exit code 1 if anything fails. Nothing is
downloaded; the network is given a few seconds.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("preflight")

import argparse
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from huggingface_hub import HfApi, constants

from scripts.base import ROOT, RecipeError, existing, one_line
from scripts.config import Config, check_places, config_from_args
from scripts.data import check_preferences, require_pairs
from scripts.driver import (
    DriverError,
    driver_branch,
    driver_version,
    gpus_of_the_driver,
    needed_driver,
)
from scripts.hub import ACCESS, TIMEOUT, HubError, hub_state
from scripts.model import attention_problem, tokenizer_at_hand
from scripts.plan import (
    checkpoint_bytes,
    dataset_size,
    estimated_lengths,
    is_local,
    kept_checkpoints,
    training_steps,
)
from scripts.plan_memory import (
    GB,
    HELD,
    ModelSizes,
    architecture,
    estimate_max_length,
    merged_bytes,
    model_sizes,
    needs,
    on_gpu,
    peak,
    stored,
)
from scripts.quiet import quiet
from scripts.sharing.compiler import FIX, missing_for_triton
from scripts.tracking import has_wandb_key

PATIENCE = 5  # seconds that a busy hub is waited for
OK, WARN, FAIL = "ok", "warn", "FAIL"
LAUNCH = "accelerate launch --config_file configs/accelerate/gpus.yaml -m scripts.training ..."


class Check(NamedTuple):
    """One line: how it stands, what was looked at, the finding, and the fix if any."""

    status: str
    what: str
    finding: str
    fix: str = ""


class PreflightError(RecipeError):
    """Something would make the run fail; the lines above say what."""


def gpu_lines(cfg: Config) -> Iterator[Check]:
    """The device that the config asks for, its driver, bfloat16, and what Triton compiles with."""
    if not on_gpu(cfg):
        yield Check(OK, "device", f"CPU, {torch.get_num_threads()} threads, as the config says")
        return
    if missing := missing_for_triton():
        finding = f"{' and '.join(missing)} missing, so the head runs in plain torch, slower"
        yield Check(WARN, "Triton", finding, FIX)
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        return
    gpu = torch.cuda.get_device_properties(0)
    finding = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"
    yield Check(OK, "GPU", finding)
    there = 0
    with suppress(DriverError):  # torch sees a GPU all the same
        there = len(gpus_of_the_driver())
    processes = int(os.environ.get("WORLD_SIZE", 1))
    yield from several_gpus(torch.cuda.device_count(), processes, there)
    if cfg.dpo.bf16 and gpu.major < 8:
        fix = "an Ampere or newer GPU (A100, A10, L4), or bf16: false and fp16: true"
        yield Check(FAIL, "bfloat16", f"{gpu.name} does not have it", fix)


def _no_gpu(cuda: str | None) -> Check:
    """Why torch, built for `cuda`, sees no GPU."""
    try:
        driver = driver_version()
    except DriverError as error:
        finding, fix = str(error), "restart the machine, or install the driver again"
    else:
        needed, branch = cuda and needed_driver(cuda), driver and driver_branch(driver)
        if driver is None:
            finding = f"no NVIDIA driver (CUDA of this torch: {cuda or 'none'})"
            fix = "nvidia-smi must list a GPU; or use the default config, which runs on a CPU"
        elif cuda is None:
            finding = f"driver {driver}, but this torch is built for the CPU"
            fix = "remove it and run bash scripts/setup.sh again"
        elif needed and branch and branch < needed:
            finding = f"driver {driver} is too old for CUDA {cuda} of this torch"
            fix = (f"a driver of {needed} or newer, or a torch built for an older CUDA "
                   "(https://pytorch.org/get-started)")  # fmt: skip
        else:
            finding = f"torch sees none, with driver {driver} and CUDA {cuda}"
            fix = "nvidia-smi must list one, and CUDA_VISIBLE_DEVICES must not hide it"
    return Check(FAIL, "GPU", finding, fix)


def several_gpus(count: int, processes: int, there: int = 0) -> Iterator[Check]:
    """One process trains on one GPU: transformers would spread it over all, which NF4 cannot."""
    if count == 1 and processes == 1 and there > 1:
        yield Check(OK, "GPUs", f"one of {there} is used; to use all: {LAUNCH}")
    if count > 1 and processes == 1:
        fix = f"export CUDA_VISIBLE_DEVICES=0 before Python starts, or one process each: {LAUNCH}"
        yield Check(FAIL, "GPUs", f"one process sees {count}", fix)


def memory_lines(cfg: Config, pairs: int | None = None) -> Iterator[Check]:
    """Free memory and disk against the plan; `pairs` are those that are trained on, if known."""
    try:
        sizes = model_sizes(cfg, architecture(cfg))
    except ValueError as error:  # PEFT's, of modules that the model does not have
        yield Check(FAIL, "adapter", one_line(error, 200), "check lora_target_modules")
        return
    except RecipeError as error:
        yield Check(WARN, "plan", str(error), "its memory could not be planned")
        return
    needed = {phase: peak(parts) for phase, parts in needs(cfg, sizes).items()}
    cuda = torch.cuda.is_available() and on_gpu(cfg)
    if on_gpu(cfg) and not cuda:
        yield Check(WARN, "GPU memory", f"{max(needed.values()):.1f} GB planned, no GPU to ask")
    else:
        yield _room(needed, cuda)
    yield from _disk(cfg, sizes, pairs)


def _room(needed: dict[str, float], cuda: bool) -> Check:
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    phase = max(needed, key=needed.get)
    finding = f"{free / GB:.1f} GB free, {needed[phase]:.1f} GB planned (in {phase})"
    spare = 1.1 if cuda else HELD  # a step is planned to a tenth
    # A merge can go on a CPU, and replies can be had fewer at a time.
    must = max(size for name, size in needed.items() if name not in ("merge", "evaluate"))
    status = OK if needed[phase] * spare < free / GB else WARN if must < free / GB else FAIL
    fix = "" if status == OK else "python -m scripts.plan names the first change that would fit"
    return Check(status, "GPU memory" if cuda else "memory", finding, fix)


def _disk(cfg: Config, sizes: ModelSizes, pairs: int | None) -> Iterator[Check]:
    """A line for each disk that model and run are written to."""
    try:
        pairs = pairs or dataset_size(cfg).pairs
    except RecipeError:  # the check of the dataset says what is wrong with it
        pairs = cfg.recipe.train_samples or 10_000
    kept = kept_checkpoints(cfg, training_steps(cfg, pairs))
    run = {
        "checkpoints": kept * checkpoint_bytes(cfg, sizes),
        "adapter": stored(cfg, sizes)["adapter"],
        "merged model": merged_bytes(cfg, sizes),
        "the rest": GB,
    }
    disks: dict[int, tuple[Path, dict[str, float]]] = {}
    for path, parts in ((Path(constants.HF_HOME), {"model": 2 * sizes.base}), (cfg.run_dir, run)):
        there = existing(path)
        _, before = disks.get(there.stat().st_dev, (there, {}))
        disks[there.stat().st_dev] = (there, before | parts)
    for there, parts in disks.values():
        free, need = shutil.disk_usage(there).free, sum(parts.values())
        shares = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items() if size)
        finding = f"{free / GB:.0f} GB free, up to {need / GB:.1f} GB needed ({shares})"
        fix = "free some, or set HF_HOME / output_dir to another disk"
        yield Check(OK, "disk", finding) if free > need else Check(FAIL, "disk", finding, fix)


def package_lines() -> Iterator[Check]:
    """The installed packages against requirements.txt."""
    lines = (line.split("#")[0] for line in (ROOT / "requirements.txt").read_text().splitlines())
    wrong = []
    for name, wanted in (line.strip().split("==") for line in lines if line.strip()):
        try:
            have = version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0
        except PackageNotFoundError:
            have = "missing"
        if have != wanted:
            wrong.append(f"{name} {have} (wanted {wanted})")
    if wrong:
        yield Check(WARN, "packages", ", ".join(wrong), "bash scripts/setup.sh")
    else:
        yield Check(OK, "packages", "as in requirements.txt")


def model_lines(cfg: Config) -> Iterator[Check]:
    """The hub, the token, and whether it may read the model, without downloading it."""
    name, revision = cfg.model.model_name_or_path, cfg.model.model_revision
    try:
        yield Check(OK, "model", f"{name} {ACCESS[hub_state(name, revision, wait=PATIENCE)]}")
    except HubError as error:
        finding, *fix = re.split(r"[.;] ", str(error), maxsplit=1)
        yield Check(FAIL, "model", finding.rstrip("."), " ".join(fix).rstrip("."))


def local_data(cfg: Config) -> tuple[list[Check], int | None]:
    """What a run would say about the data on this machine, with the same checks, and how many
    pairs it would train on. Where `max_length` is `auto`, the plan takes what it is likely to be.
    """
    tokenizer = tokenizer_at_hand(cfg.model.model_name_or_path, cfg.model.model_revision)
    check = "python -m scripts.data check"
    try:
        pairs, report = check_preferences(cfg, tokenizer)
        require_pairs(pairs, report)
    except RecipeError as error:
        return [Check(FAIL, "dataset", str(error), check if check not in str(error) else "")], None
    if cfg.length_is_open and tokenizer is None:
        estimate_max_length(cfg, estimated_lengths(pairs["train"]))
    train, held_out = len(pairs["train"]), len(pairs["test"])
    finding = f"{cfg.script.dataset_name}: {train:,} pairs to train on, {held_out:,} held out"
    if cfg.length_is_open:
        finding += f", max_length about {cfg.dpo.max_length}"
    if tokenizer is None:
        finding += " (tokens not checked: the tokenizer is not here yet)"
    count = min(train, cfg.recipe.train_samples or train)
    bad = len({(f.split, f.where) for f in report.bad()})
    if not bad:
        return [Check(OK, "dataset", finding)], count
    status = FAIL if cfg.recipe.on_bad_rows == "error" else WARN
    finding += f", {bad} bad {'row' if bad == 1 else 'rows'}"
    return [Check(status, "dataset", finding, check)], count


def hub_dataset(cfg: Config) -> Iterator[Check]:
    """Whether the hub has the dataset."""
    name = cfg.script.dataset_name
    try:
        HfApi().dataset_info(name, revision=cfg.recipe.dataset_revision, timeout=TIMEOUT)
        yield Check(OK, "dataset", f"{name}: on the hub")
    except Exception as error:  # httpx, the hub and sockets share no nearer base
        fix = "check the spelling and the network, or set dataset_name to a folder"
        yield Check(FAIL, "dataset", f"{name}: {one_line(error, 90)}", fix)


def place_lines(cfg: Config) -> Iterator[Check]:
    """Whether the folders that the config names can serve, and the model's attention."""
    try:
        check_places(cfg)
    except RecipeError as error:
        yield Check(FAIL, "folders", str(error), "repair it, or name another in the config")
    with suppress(RecipeError):  # the check of the memory says so
        if problem := attention_problem(architecture(cfg), cfg.model.attn_implementation):
            finding, _, fix = problem.partition("; ")
            yield Check(FAIL, "attention", finding, fix)


def tracking_lines(cfg: Config) -> Iterator[Check]:
    """Where Weights & Biases records the run; never a failure, since the run goes on offline."""
    if "wandb" not in cfg.dpo.report_to:
        yield Check(OK, "W&B", "off (report_to)")
    elif has_wandb_key():
        yield Check(OK, "W&B", "there is a key")
    else:
        yield Check(WARN, "W&B", "no key: the run is recorded offline", "export WANDB_API_KEY=...")


def preflight(cfg: Config) -> list[Check]:
    """All checks, in order."""
    # First the data: the plan reckons with its lengths.
    data, pairs = local_data(cfg) if is_local(cfg) else (hub_dataset(cfg), None)
    return [
        *gpu_lines(cfg),
        *place_lines(cfg),
        *package_lines(),
        *memory_lines(cfg, pairs),
        *data,
        *model_lines(cfg),
        *tracking_lines(cfg),
    ]


def show(checks: list[Check]) -> None:
    """Print the lines.

    Raises:
        PreflightError: something fails.
    """
    for status, what, finding, fix in checks:
        print(f"{status:<5} {what:<19} {finding}" + (f"\n{'':<25} -> {fix}" if fix else ""))
    failed = [check.what for check in checks if check.status == FAIL]
    if failed:
        raise PreflightError(f"this run would fail: {', '.join(failed)}")


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args, may_lack_gpu=True)
    quiet()
    show(preflight(cfg))
