"""Cores of their own: nobody shares one, and the whole process is kept on them."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.cluster.pinning import share_out
from pipelinerl.errors import EnvironmentProblem
from tests.unit.fakes import small_config


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sets(st.integers(0, 99), min_size=1))
def test_every_process_has_the_same_number_of_cores_that_are_nobody_elses(
    ranks: int, engines: int, width: int, cores: set[int]
) -> None:
    config = small_config(
        f"trainer.ranks={ranks}",
        f"engine.count={engines}",
        f"engine.tensor_parallel={width}",
        "batch.groups_per_step=8",
    )
    if len(cores) < ranks + engines * width:
        with pytest.raises(EnvironmentProblem, match=f"{ranks + engines * width} in all, and this machine has"):
            share_out(config, list(cores))
        return
    trainers, rollout = share_out(config, list(cores))
    each = len(cores) // (ranks + engines * width)
    assert [len(own) for own in trainers] == [each] * ranks
    assert [len(own) for own in rollout] == [each * width] * engines
    given_out = [core for own in [*trainers, *rollout] for core in own]
    assert len(set(given_out)) == len(given_out) and set(given_out) <= cores


def test_threads_that_run_already_and_children_are_kept_on_the_cores_too() -> None:
    core = max(os.sched_getaffinity(0))
    program = f"""
import os, subprocess, sys, threading
from pathlib import Path
from pipelinerl.cluster.pinning import pin_this_process
stop = threading.Event()
threading.Thread(target=stop.wait).start()
pin_this_process([{core}])
found = [os.sched_getaffinity(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]
stop.set()
child = subprocess.run([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], capture_output=True)
print(found, child.stdout.decode().strip())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[{core}, {core}]} {{{core}}}"
