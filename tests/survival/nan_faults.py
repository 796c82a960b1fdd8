"""A loss, gradient or weight is not finite: no adapter; the last good checkpoint and the batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

from tests.survival import tiny
from tests.survival.probes import NotFinite

AREA = "not finite in training"


def broken(where: str, step: int) -> None:
    run_dir = tiny.scratch("nan") / "run"
    done = tiny.run(run_dir, probe=NotFinite(step, where))
    assert done.code == 1, done.text[-1500:]
    line = done.one_line()
    assert "failed_batch.json" in line and "nan" not in done.text.split("error:")[0], done.text
    assert f"training stopped at step {step + 1}" in line, line
    found = json.loads((run_dir / "failed_batch.json").read_text())
    assert found["step"] == step + 1 and found["pairs"], found
    assert all(pair["chosen"].startswith("<|begin_of_text|>") for pair in found["pairs"]), found
    assert not (run_dir / "adapter").exists()
    kept = int(line.split("checkpoint-")[1].split(",")[0])
    # The step before, unless its weights are lost: then the last that was saved.
    assert kept == (step if where == "gradient" else step - step % 2), line
    again = tiny.run(run_dir)
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "infinite learning rate", partial(broken, "rate", 3)
    yield "NaN in a gradient", partial(broken, "gradient", 3)
    yield "NaN in the weights", partial(broken, "weights", 2)
