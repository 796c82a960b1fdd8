"""Read a run's folder and say in words what happened, with the evidence and what to try.

    python -m scripts.doctor outputs/smollm2-135m-cpu

Reads `metrics.jsonl` and, if they exist, `config.yaml`, `evaluation.json` and `failed_batch.json`.
Rewards are in nats, as in the log: beta times a log-ratio (DPO paper, arXiv 2305.18290, section 4).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("doctor")

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import yaml

from scripts.base import RecipeError

FEWEST_STEPS = 10  # with fewer logs there is no trend to see
# In log-probability, not reward: how far an answer fell must not depend on beta.
FALLEN = 2.0  # nats that the chosen answers lost, on average
FALLEN_SHARE = 0.2  # of the margin; a smaller fall is a side effect
LEAP_SHARE, LEAP_NATS = 0.5, 1.0  # share of the largest margin between two logs, and at least this
EARLY = 0.2  # the first fifth of the run
ALL_RIGHT = 0.99  # an accuracy of 1, give or take a pair in a hundred
NO_MARGIN = 0.02  # nats of reward: nothing was learned
LENGTH_RULE, LENGTH_FOLLOWS = 0.9, 0.7  # accuracy of length alone; correlation of margins with it
OVERFITTED = 0.2  # accuracy on training pairs minus that on held-out ones


@dataclass(frozen=True)
class Diagnosis:
    """One thing that happened: a name, what it means, the numbers, and the change to try."""

    name: str
    words: str
    evidence: str
    change: str = ""

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.words}", f"  evidence: {self.evidence}"]
        return "\n".join(lines + [f"  try:      {self.change}"] * bool(self.change))


@dataclass
class RunFolder:
    """What a run left behind: its training logs in order, its config, and its evaluation."""

    steps: list[dict]
    config: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)  # the step that was not finite and ended training

    @property
    def beta(self) -> float:
        return float(self.config.get("beta", 0.1))

    @property
    def learning_rate(self) -> float:
        return float(self.config.get("learning_rate") or max(self.column("learning_rate")))

    @property
    def has_sft(self) -> bool:
        return "sft" in self.config.get("loss_type", [])

    def column(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]

    def late(self, name: str) -> float:
        """The mean of the last fifth of the logs."""
        values = self.column(name)
        return fmean(values[-max(1, len(values) // 5) :])


def read_run(folder: Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        RecipeError: there is no such folder, no log in it, or a damaged file.
    """
    folder = Path(folder)
    log = folder / "metrics.jsonl"
    if not log.is_file():
        what = "no log (metrics.jsonl)" if folder.is_dir() else "no such folder"
        raise RecipeError(f"{folder}: {what}; give a run's folder, outputs/<run name>")
    steps = []
    for number, line in enumerate(log.read_text(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise RecipeError(f"{log}, line {number} is not JSON; delete that line") from None
        if "loss" in row and "rewards/margins" in row:  # not an evaluation's log, or the last
            steps.append(row)
    if not steps:
        raise RecipeError(f"{log} has no training step yet; wait for the first log")
    names = ("config.yaml", "evaluation.json", "failed_batch.json")
    config, evaluation, failed = (_read(folder / name) for name in names)
    if failed.get("step", 0) <= steps[-1].get("step", 0):  # of an earlier attempt
        failed = {}
    return RunFolder(steps, config, evaluation, failed)


def _read(path: Path) -> dict:
    """A YAML or JSON mapping (JSON is YAML too); empty if there is no such file."""
    try:
        return dict(yaml.safe_load(path.read_text())) if path.is_file() else {}
    except (yaml.YAMLError, ValueError, TypeError):
        raise RecipeError(f"{path} cannot be read; make it again or delete it") from None


def diagnose(run: RunFolder) -> list[Diagnosis]:
    """What happened, the most serious first; `steady` if nothing went wrong."""
    if broken := not_finite(run):
        return [broken]  # all other numbers are meaningless then
    if short := too_few_steps(run):
        return [short]
    found = [finding for check in CHECKS if (finding := check(run))]
    return found or [steady(run)]


def not_finite(run: RunFolder) -> Diagnosis | None:
    """NaN or infinity in a log, or in the step that ended training.

    transformers keeps them out of `loss`, so all columns count.
    """
    slower = f"learning_rate: {run.learning_rate / 10:g} and max_grad_norm: 1.0"
    if run.failed:
        return Diagnosis(
            "NaN",
            "the arithmetic broke down, and training stopped there",
            f"step {run.failed['step']}: {run.failed['what']}; its pairs are in failed_batch.json, "
            f"learning rate {run.learning_rate:g}",
            f"{slower}; look at the pairs",
        )
    for step in run.steps:
        bad = [k for k, v in step.items() if isinstance(v, float) and not math.isfinite(v)]
        if bad:
            return Diagnosis(
                "NaN",
                "the arithmetic broke down; nothing was learned after it, and the adapter is "
                "useless",
                f"{', '.join(f'{name} is {step[name]}' for name in sorted(bad)[:3])} at step "
                f"{step['step']}, learning rate {run.learning_rate:g}",
                f"{slower}; bf16: true rather than fp16: true",
            )
    return None


def too_few_steps(run: RunFolder) -> Diagnosis | None:
    if len(run.steps) >= FEWEST_STEPS:
        return None
    few = len(run.steps)
    return Diagnosis(
        "too few steps",
        "this run is too short to show a trend",
        f"{few} log{'s' * (few != 1)} to step {run.steps[-1]['step']}; {FEWEST_STEPS} are needed",
        "more pairs (train_samples), more num_train_epochs, or a smaller logging_steps",
    )


def chosen_falls(run: RunFolder) -> Diagnosis | None:
    """Likelihood displacement: Razin et al., arXiv 2410.08847, section 3."""
    reward, margin = run.late("rewards/chosen"), run.late("rewards/margins")
    fall = -reward / run.beta
    if fall < FALLEN or -reward < FALLEN_SHARE * abs(margin):
        return None
    slower = f"learning_rate: {run.learning_rate / 3:.2g}"
    cure = f"loss_type: [sigmoid, sft] with loss_weights: [1.0, 1.0]; else {slower}"
    if run.has_sft:
        cure = f"{slower}, or a larger weight of sft in loss_weights"
    return Diagnosis(
        "chosen reward falls",
        "the model unlearns the good answers along with the bad ones; the margin only grows "
        "because the bad ones fall further",
        f"chosen reward {reward:+.2f} and rejected {run.late('rewards/rejected'):+.2f} at the end: "
        f"a chosen answer is e^{fall:.1f} times less probable than before",
        cure,
    )


def leap(run: RunFolder) -> Diagnosis | None:
    """More than half of the margin between two logs: the step was too large.

    A log is of one batch, and batches differ: the three logs after a leap must confirm it.
    """
    margins = run.column("rewards/margins")
    jumps = [
        min(after, fmean(margins[at : at + 3])) - before
        for at, (before, after) in enumerate(pairwise(margins), 1)
    ]
    jumps = jumps[:-1] if len(jumps) > 5 else jumps
    at = max(range(len(jumps)), key=jumps.__getitem__)
    if jumps[at] < max(LEAP_SHARE * max(map(abs, margins)), LEAP_NATS):
        return None
    return Diagnosis(
        "margin in one leap",
        "one step decided nearly everything; the later ones could only repair it",
        f"margin {margins[at]:+.2f} at step {run.steps[at]['step']}, {margins[at + 1]:+.2f} at the "
        f"next log, {max(margins):+.2f} at most",
        f"learning_rate: {run.learning_rate / 5:.2g}, warmup_steps: a tenth of all steps, "
        "max_grad_norm: 1.0",
    )


def right_at_once(run: RunFolder) -> Diagnosis | None:
    accuracies = run.column("rewards/accuracies")
    early = max(2, math.ceil(EARLY * len(accuracies)))
    after = fmean(accuracies[early:])
    if after < ALL_RIGHT:
        return None
    first = next(s["step"] for s in run.steps if s["rewards/accuracies"] >= ALL_RIGHT)
    return Diagnosis(
        "accuracy at once 1",
        "something easy tells the pairs apart, so the accuracy cannot show what later steps taught",
        f"accuracy reached {ALL_RIGHT:.2f} at step {first}, and was {after:.2f} on average after "
        "the first fifth",
        "python -m scripts.data check --config ... shows whether length, a phrase or a format "
        "tells them apart; if so, harder pairs; if not, "
        f"learning_rate: {run.learning_rate / 5:.2g}",
    )


def length_only(run: RunFolder) -> Diagnosis | None:
    """Held-out margins that follow length: Park et al., arXiv 2403.19159, section 3."""
    length = run.evaluation.get("length")
    if not length or length["rule_accuracy"] < LENGTH_RULE:
        return None
    follows = length["margin_correlation"]
    if follows is None or abs(follows) < LENGTH_FOLLOWS:
        return None
    return Diagnosis(
        "length only",
        "length alone tells the held-out pairs apart, and the margins follow it; these pairs "
        "cannot show whether anything else was learned",
        f'the rule "the {length["rule"]} answer wins" is right in {length["rule_accuracy"]:.2f} of '
        f"the pairs; margins and length differences correlate by {follows:+.2f}",
        "pairs of similar length, or loss_type: sigmoid_norm with a beta of about 5.0; and judge "
        "what the replies say",
    )


def emptier(run: RunFolder) -> Diagnosis | None:
    """Shorter replies that say less: the interval of the change in key facts is all below 0."""
    measures = run.evaluation.get("measures", {})
    facts, length = measures.get("facts"), measures.get("length")
    if not facts or facts["change"]["high"] is None or facts["change"]["high"] >= 0:
        return None
    return Diagnosis(
        "emptier replies",
        "replies mention fewer of the key facts than before",
        f"key facts {facts['base']['mean']:.2f} before, {facts['tuned']['mean']:.2f} after (change "
        f"{facts['change']['low']:+.2f} to {facts['change']['high']:+.2f}); length "
        f"{length['base']['mean']:.0f} to {length['tuned']['mean']:.0f} tokens",
        "an SFT term (loss_type: [sigmoid, sft]), or more weight on it, or a higher beta",
    )


def overfitted(run: RunFolder) -> Diagnosis | None:
    held_out = run.evaluation.get("reward_accuracy", {}).get("mean")
    train = run.late("rewards/accuracies")
    if held_out is None or train - held_out < OVERFITTED:
        return None
    return Diagnosis(
        "learned by heart",
        "the model tells training pairs apart far better than held-out ones",
        f"accuracy {train:.2f} on the last training pairs, {held_out:.2f} on held-out pairs",
        "fewer num_train_epochs, more pairs, or a smaller lora_r",
    )


def nothing_learned(run: RunFolder) -> Diagnosis | None:
    margin = run.late("rewards/margins")
    if abs(margin) >= NO_MARGIN:
        return None
    return Diagnosis(
        "nothing learned",
        "the policy is still the reference",
        f"margin {margin:+.3f} nats at the end, learning rate {run.learning_rate:g}",
        f"learning_rate: {run.learning_rate * 5:.2g}, or more steps",
    )


def steady(run: RunFolder) -> Diagnosis:
    return Diagnosis(
        "steady",
        "the margin grew step by step and the chosen answers held up; still, read the replies",
        f"margin {run.late('rewards/margins'):+.2f}, chosen reward "
        f"{run.late('rewards/chosen'):+.2f}, accuracy {run.late('rewards/accuracies'):.2f} over "
        f"the last fifth of {len(run.steps)} logs",
    )


CHECKS: tuple[Callable[[RunFolder], Diagnosis | None], ...] = (
    chosen_falls,
    leap,
    right_at_once,
    length_only,
    emptier,
    overfitted,
    nothing_learned,
)


def in_words(folder: Path) -> Iterator[str]:
    """What `python -m scripts.doctor` prints, finding by finding.

    Raises:
        RecipeError: the folder is not a run's, or a file in it is damaged.
    """
    run = read_run(folder)
    try:
        found = diagnose(run)
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        files = "metrics.jsonl, config.yaml or evaluation.json"
        raise RecipeError(f"{folder}: {files} is damaged ({error!r}); move it away") from error
    yield from map(str, found)
    if not run.evaluation:
        yield "There is no evaluation.json yet: held-out pairs and replies were not measured."


def main(args: argparse.Namespace) -> None:
    print("\n\n".join(in_words(args.folder)))
