"""One fault of each kind, done for real; all of them: `python -m tests.survival`."""

from __future__ import annotations

import pytest

from tests.survival import __main__ as runner

SAMPLE = (
    "SIGKILL after step 3",
    "SIGKILL after step 3, two passes, accumulated",
    "SIGKILL as the optimiser is written",
    "SIGKILL before old ones go",
    "optimizer.pt missing",
    "copied under other names",
    "stopped again once a new one is written",
    "resumed with another beta",
    "resumed with other data under the same name",
    "the command given again after the run has finished",
    "a finished run that kept no checkpoint",
    "a second run in a folder in use",
    "a folder that cannot be locked",
    "SIGKILL after step 3, length chosen from the data",
    "a longer run under a constant rate",
    "a shorter run under a constant rate",
    "SIGHUP between two steps",
    "the output's reader goes",
    "SIGTERM in a step",
    "SIGINT between two logs",
    "infinite learning rate",
    "the first checkpoint",
    "the adapter",
    "torch has no more",
    "GPU has no more",
    "the dataset is gone on going on",
)


@pytest.fixture(scope="module")
def faults():
    return {fault.name: fault for fault in runner.discover()}


@pytest.mark.parametrize("name", SAMPLE)
def test_it_survives(faults, name):
    faults[name].do()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["the kernel is killed, as for lack of memory", "SIGTERM to the command"]
)
def test_the_headless_notebook_survives(faults, name):
    faults[name].do()


def test_the_table_counts_what_was_not_survived():
    def survived() -> None:
        pass

    def lost() -> None:
        raise AssertionError("the adapter is gone\nand more")

    tried = [runner.Fault("area", "one", survived), runner.Fault("area", "two", lost)]
    outcomes = [runner.attempt(fault) for fault in tried]
    assert outcomes[1].detail == "AssertionError: the adapter is gone"
    assert runner.table(outcomes).splitlines()[-1] == "| area | 2 | 1 |"


def test_every_fault_has_a_name_of_its_own(faults):
    found = list(runner.discover())
    assert len({(fault.area, fault.name) for fault in found}) == len(found)
