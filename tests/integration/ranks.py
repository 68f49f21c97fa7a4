"""Runs trainer cases, each on ranks of its own: `python -m tests.integration.ranks MODULE IN OUT`.

DeepSpeed takes seconds to import and its state is global. So one process imports it once, and every rank of every case
is a fork of it that starts a process group, calls `run_rank(case, rank, port, out)` of MODULE, and exits. A case is any
record with the configuration of its run as `config`; what `run_rank` pickles to `out` is the result of the rank.
"""

import gc
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

CASE_TIMEOUT_S = 120


def results_of(module: ModuleType, cases: Mapping[str, Any], folder: Path) -> dict[str, list[Any]]:
    """What every case ended with, as [rank]. `module` is the one with `run_rank`."""
    source = folder / "cases.pickle"
    source.write_bytes(pickle.dumps(cases))
    process = subprocess.run(
        [sys.executable, "-m", "tests.integration.ranks", module.__name__, source, folder],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return {
        name: [
            pickle.loads((folder / f"{name}-{rank}.pickle").read_bytes()) for rank in range(case.config.trainer.ranks)
        ]
        for name, case in cases.items()
    }


class Forks:
    """The ranks of one case, at work."""

    def __init__(self, run_rank: Callable[..., None], name: str, case: Any, target: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        forks = multiprocessing.get_context("fork")
        outs = [target / f"{name}-{rank}.pickle" for rank in range(case.config.trainer.ranks)]
        self._name = name
        self._ranks = [forks.Process(target=run_rank, args=(case, rank, port, out)) for rank, out in enumerate(outs)]
        self._deadline = time.monotonic() + CASE_TIMEOUT_S
        for process in self._ranks:
            process.start()

    def __len__(self) -> int:
        return len(self._ranks)

    def ended(self) -> bool:
        """Whether all ranks are done. Ends everything when one failed or the time is over."""
        codes = [process.exitcode for process in self._ranks]
        if codes == [0] * len(codes):
            return True
        if any(codes) or time.monotonic() > self._deadline:
            time.sleep(1)  # for the others to say what they have to say
            for process in self._ranks:
                process.kill()
            sys.exit(f"case {self._name}: exit codes {codes}")
        return False


def main(module: str, source: str, target: str) -> None:
    """Run the cases in their order, as many at a time as there are cores for. One that loads waits for all before."""
    import deepspeed.ops

    import pipelinerl.trainer.worker  # noqa: F401  the slow imports, once for all forks

    assert deepspeed.ops.__compatible_ops__  # the same for a probe that runs compilers
    gc.freeze()  # what is imported is no garbage: the forks need not look through it
    run_rank = import_module(module).run_rank
    cores, running = len(os.sched_getaffinity(0)), list[Forks]()
    for name, case in pickle.loads(Path(source).read_bytes()).items():
        waits = getattr(case, "load", None) is not None
        while running and (waits or sum(map(len, running)) + case.config.trainer.ranks > cores):
            time.sleep(0.02)
            running = [forks for forks in running if not forks.ended()]
        running.append(Forks(run_rank, name, case, Path(target)))
    while running:
        time.sleep(0.02)
        running = [forks for forks in running if not forks.ended()]


if __name__ == "__main__":
    main(*sys.argv[1:])
