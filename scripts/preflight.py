"""Find out in seconds what would otherwise fail after a long download.

    python -m scripts.preflight --config configs/llama3-8b-a100.yaml

One line a check: ok, warn or FAIL, with the fix. Exit code 1 if anything fails. Nothing is
downloaded; the network is asked in parallel and given a few seconds.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("preflight")

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import requests
import torch
from huggingface_hub import HfApi, constants, get_token

from scripts.base import ROOT, RecipeError
from scripts.config import Config, check_places, config_from_args
from scripts.data import check_preferences, require_pairs
from scripts.driver import (
    DriverError,
    driver_branch,
    driver_version,
    gpus_of_the_driver,
    needed_driver,
)
from scripts.hub import falls_back, hub_state, why_not
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

PATIENCE = 15  # seconds for all that is asked of the network
OK, WARN, FAIL = "ok", "warn", "FAIL"


class Check(NamedTuple):
    """One line: how it stands, what was looked at, the finding, and the fix if any."""

    status: str
    what: str
    finding: str
    fix: str = ""


class PreflightError(RecipeError):
    """Something would make the run fail; the lines above say what."""


def gpu(cfg: Config) -> Iterator[Check]:
    """The device that the config asks for, its driver, and bfloat16."""
    if not on_gpu(cfg):
        yield Check(OK, "device", f"CPU, {torch.get_num_threads()} threads, as the config says")
        return
    if not torch.cuda.is_available():
        try:
            yield _no_gpu(torch.version.cuda, driver_version())
        except DriverError as error:
            yield Check(FAIL, "GPU", str(error), "the driver must work before torch can use a GPU: "
                        "restart the machine, or install the driver anew")  # fmt: skip
        return
    properties = torch.cuda.get_device_properties(0)
    major, minor = properties.major, properties.minor
    finding = f"{properties.name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    yield Check(OK, "GPU", finding)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    try:
        there = len(gpus_of_the_driver())
    except DriverError:  # torch sees a GPU all the same
        there = 0
    yield from several_gpus(torch.cuda.device_count(), processes, there)
    if cfg.dpo.bf16 and major < 8:
        fix = "an Ampere or newer GPU (A100, A10, L4), or bf16: false and fp16: true"
        yield Check(FAIL, "bfloat16", f"not on compute capability {major}.{minor}", fix)


def _no_gpu(cuda: str | None, driver: str | None) -> Check:
    """Why torch, built for `cuda`, sees no GPU under `driver`."""
    if driver is None:
        return Check(FAIL, "GPU", f"no NVIDIA driver (CUDA of this torch: {cuda or 'none'})",
                     "nvidia-smi must list a GPU; or take the default config, which runs on a "
                     "CPU")  # fmt: skip
    if cuda is None:
        return Check(FAIL, "GPU", f"driver {driver}, but this torch is built for the CPU",
                     "remove it and run bash scripts/setup.sh again")  # fmt: skip
    needed, branch = needed_driver(cuda), driver_branch(driver)
    if needed and branch and branch < needed:
        return Check(FAIL, "GPU", f"driver {driver} is too old for CUDA {cuda} of this torch",
                     f"a driver of {needed} or newer, or a torch built for an older CUDA "
                     "(https://pytorch.org/get-started)")  # fmt: skip
    return Check(FAIL, "GPU", f"torch sees none, with driver {driver} and CUDA {cuda}",
                 "nvidia-smi must list one, and CUDA_VISIBLE_DEVICES must not hide it")  # fmt: skip


LAUNCH = "accelerate launch --config_file configs/accelerate/gpus.yaml -m scripts.training ..."


def several_gpus(count: int, processes: int, there: int = 0) -> Iterator[Check]:
    """One process trains on one GPU: transformers would spread it over all, which NF4 cannot."""
    if count == 1 and processes == 1 and there > 1:
        yield Check(OK, "GPUs", f"one of {there} is used; all of them: {LAUNCH}")
    if count > 1 and processes == 1:
        yield Check(FAIL, "GPUs", f"{count} are visible to one process",
                    "export CUDA_VISIBLE_DEVICES=0 before Python starts, or start one process for "
                    "each: " + LAUNCH)  # fmt: skip


def triton(cfg: Config) -> Iterator[Check]:
    """What Triton compiles with, where a GPU is meant."""
    if on_gpu(cfg) and (missing := missing_for_triton()):
        finding = f"{' and '.join(missing)} missing, so the head runs in plain torch, slower"
        yield Check(WARN, "Triton", finding, FIX)


def memory(cfg: Config, pairs: int | None = None) -> Iterator[Check]:
    """Free memory and disk against the plan; `pairs` are those that are trained on, if known."""
    try:
        sizes = model_sizes(cfg, architecture(cfg))
    except ValueError as error:  # PEFT's, of modules that the model does not have
        yield Check(FAIL, "adapter", " ".join(str(error).split())[:200], "see lora_target_modules")
        return
    except RecipeError as error:
        yield Check(WARN, "plan", str(error), "its memory cannot be foretold")
        return
    needed = {k: peak(v) for k, v in needs(cfg, sizes).items()}
    cuda = torch.cuda.is_available() and on_gpu(cfg)
    if on_gpu(cfg) and not cuda:
        yield Check(WARN, "GPU memory", f"{max(needed.values()):.1f} GB planned, no GPU to ask")
    else:
        yield _room(needed, cuda)
    yield from _disk(cfg, sizes, pairs)


def _disk(cfg: Config, sizes: ModelSizes, pairs: int | None) -> Iterator[Check]:
    """A line for each disk that model and run are written to."""
    try:
        pairs = pairs or dataset_size(cfg).pairs
    except RecipeError:  # the check of the dataset says what is wrong with it
        pairs = cfg.recipe.train_samples or 10_000
    kept = kept_checkpoints(cfg, training_steps(cfg, pairs))
    wanted = [
        (Path(constants.HF_HOME), {"model": 2 * sizes.base}),
        (cfg.run_dir, {
            "checkpoints": kept * checkpoint_bytes(cfg, sizes),
            "adapter": stored(cfg, sizes)["adapter"],
            "merged model": merged_bytes(cfg, sizes),
            "the rest": GB,
        }),
    ]  # fmt: skip
    disks: dict[int, tuple[Path, dict[str, float]]] = {}
    for path, parts in wanted:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        _, before = disks.get(there.stat().st_dev, (there, {}))
        disks[there.stat().st_dev] = (there, before | parts)
    for there, parts in disks.values():
        free, need = shutil.disk_usage(there).free, sum(parts.values())
        shares = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items() if size)
        finding = f"{free / GB:.0f} GB free, up to {need / GB:.1f} GB needed ({shares})"
        fits, fix = free > need, "free some, or set HF_HOME / output_dir to another disk"
        yield Check(OK if fits else FAIL, "disk", finding, "" if fits else fix)


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


def versions(cfg: Config) -> Iterator[Check]:
    """The installed packages against requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wrong = []
    for line in (line.split("#")[0].strip() for line in lines):
        if not line:
            continue
        name, wanted = line.split("==")
        try:
            have = version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0
        except PackageNotFoundError:
            have = "not there"
        if have != wanted:
            wrong.append(f"{name} {have} (wanted {wanted})")
    if wrong:
        yield Check(WARN, "packages", ", ".join(wrong), "bash scripts/setup.sh")
    else:
        yield Check(OK, "packages", "as requirements.txt has them")


def model(cfg: Config) -> Iterator[Check]:
    """The hub, the token, and whether it may read the model, without downloading it."""
    name, revision = cfg.model.model_name_or_path, cfg.model.model_revision
    state = hub_state(name, revision, wait=PATIENCE / 3)
    page = f"{constants.ENDPOINT}/{name}"
    if state in ("local", "open", "granted", "cached"):
        yield Check(OK, "model", f"{name}: {state}")
    elif falls_back(name, revision, state):
        yield Check(OK, "model", f"{name}: hub {state}, but PyPI has it")
    elif state in ("token", "revision", "busy"):
        fixes = {"token": "set HF_TOKEN to a new token, or unset it", "busy": "try again then",
                 "revision": "check model_revision"}  # fmt: skip
        yield Check(FAIL, "model", why_not(name, revision, state), fixes[state])
    elif state == "unreachable":
        yield Check(FAIL, "model", f"{name}: the hub cannot be reached",
                    "check the network and HF_HUB_OFFLINE, or give a folder")  # fmt: skip
    elif state == "missing":
        who = "for this token" if get_token() else "that is open to all"
        yield Check(FAIL, "model", f"{name}: no such model {who}", f"check {page}")
    elif get_token():
        yield Check(FAIL, "model", f"{name} is gated and this token may not read it",
                    f"accept the licence at {page}; give the token the right to read gated "
                    "repositories")  # fmt: skip
    else:
        yield Check(FAIL, "model", f"{name} is gated and there is no token",
                    f"accept the licence at {page}, then export HF_TOKEN=...")  # fmt: skip


def local_data(cfg: Config) -> tuple[list[Check], int | None]:
    """What a run would say to the data on this machine, with the same checks, and how many pairs
    it would train on. Where `max_length` is `auto`, the plan takes what it is likely to be."""
    name = cfg.script.dataset_name
    tokenizer = tokenizer_at_hand(cfg.model.model_name_or_path, cfg.model.model_revision)
    try:
        pairs, report = check_preferences(cfg, tokenizer)
        require_pairs(pairs, report)
    except RecipeError as error:
        fix = "python -m scripts.data check"
        return [Check(FAIL, "dataset", str(error), fix if fix not in str(error) else "")], None
    if cfg.length_is_open and tokenizer is None:
        estimate_max_length(cfg, estimated_lengths(pairs["train"]))
    count = min(len(pairs["train"]), cfg.recipe.train_samples or len(pairs["train"]))
    finding = f"{name}: {len(pairs['train']):,} pairs to train on, {len(pairs['test']):,} held out"
    if cfg.length_is_open:
        finding += f", max_length about {cfg.dpo.max_length}"
    if tokenizer is None:
        finding += " (tokens not checked: the tokenizer is not here yet)"
    bad = len({(f.split, f.where) for f in report.bad()})
    if not bad:
        return [Check(OK, "dataset", finding)], count
    status = FAIL if cfg.recipe.on_bad_rows == "error" else WARN
    finding += f", {bad} bad {'row' if bad == 1 else 'rows'}"
    return [Check(status, "dataset", finding, "python -m scripts.data check")], count


def dataset(cfg: Config) -> Iterator[Check]:
    """Whether the dataset is there, and on this machine whether it can be trained on."""
    name = cfg.script.dataset_name
    if name is None:
        yield Check(FAIL, "dataset", "dataset_name is not set", "name a file, folder or dataset")
    elif is_local(cfg):
        yield from local_data(cfg)[0]
    else:
        try:
            HfApi().dataset_info(name, revision=cfg.recipe.dataset_revision, timeout=8)
            yield Check(OK, "dataset", f"{name}: on the hub")
        except Exception as error:  # httpx, the hub and sockets share no nearer base
            reason = (str(error) or type(error).__name__).splitlines()[0][:90]
            yield Check(FAIL, "dataset", f"{name}: {reason}",
                        "check the spelling and the network, or give a folder")  # fmt: skip


def places(cfg: Config) -> Iterator[Check]:
    """Whether the folders that the config names can serve, and the model's attention."""
    try:
        check_places(cfg)
    except RecipeError as error:
        yield Check(FAIL, "folders", str(error), "mend it, or name another in the config")
    try:
        problem = attention_problem(architecture(cfg), cfg.model.attn_implementation)
    except RecipeError:  # the check of the memory says so
        problem = None
    if problem:
        finding, _, fix = problem.partition("; ")
        yield Check(FAIL, "attention", finding, fix)


def tracking(cfg: Config) -> Iterator[Check]:
    """Whether Weights & Biases can be had; never a failure, since the run goes on offline."""
    if "wandb" not in cfg.dpo.report_to:
        yield Check(OK, "W&B", "off (report_to)")
    elif not has_wandb_key():
        yield Check(WARN, "W&B", "no key: the run is recorded offline", "export WANDB_API_KEY=...")
    else:
        url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
        try:
            key = os.environ.get("WANDB_API_KEY", "")
            query = {"query": "query { viewer { username } }"}
            answer = requests.post(f"{url}/graphql", json=query, auth=("api", key), timeout=8)
            known = answer.ok and (answer.json().get("data") or {}).get("viewer")
            status, finding = (OK, "the key is accepted") if known else (WARN, "the key is refused")
            if key == "":
                status, finding = OK, "a key from an earlier wandb login"
            yield Check(status, "W&B", finding, "" if status == OK else "wandb login --relogin")
        except (requests.RequestException, ValueError) as error:
            yield Check(WARN, "W&B", f"no answer from {url} ({type(error).__name__})",
                        "the run is recorded offline")  # fmt: skip


LOCAL = (gpu, triton, places, versions)
REMOTE = (model, dataset, tracking)


def preflight(cfg: Config, patience: float = PATIENCE) -> list[Check]:
    """All checks, in order. The remote ones run side by side and have `patience` seconds."""
    pool = ThreadPoolExecutor(len(REMOTE))
    local = is_local(cfg)
    remote = [check for check in REMOTE if not (local and check is dataset)]
    asked = {check: pool.submit(lambda c=check: list(c(cfg))) for check in remote}
    lines, pairs = local_data(cfg) if local else ([], None)  # first: the plan reckons with it
    checks = [line for check in LOCAL for line in check(cfg)]
    checks += [*memory(cfg, pairs), *lines]
    for check, future in asked.items():
        try:
            checks += future.result(timeout=patience)
        except Late:
            patience = 0.1  # they all began together
            fix = "check the network; the run may hang there too"
            checks.append(Check(FAIL, check.__name__, "no answer in time", fix))
    pool.shutdown(wait=False, cancel_futures=True)
    return checks


def show(checks: list[Check], out: Callable[[str], None] = print) -> None:
    """Print the lines.

    Raises:
        PreflightError: something fails.
    """
    for status, what, finding, fix in checks:
        out(f"{status:<5} {what:<19} {finding}" + (f"\n{'':<25} -> {fix}" if fix else ""))
    failed = [check.what for check in checks if check.status == FAIL]
    if failed:
        raise PreflightError(f"this run would fail: {', '.join(failed)}")


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args, may_lack_gpu=True)
    quiet()
    code = 0
    try:
        show(preflight(cfg))
    except PreflightError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    os._exit(code)  # a check that still waits for the network must not hold the answer up
