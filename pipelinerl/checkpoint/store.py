"""The checkpoints of a run on disk: `<run_dir>/checkpoints/step_000050/`, and `latest` with the name of the newest.

A checkpoint is filled in a `.partial` folder, which gets its name when everything in it is on the disk. So whatever
moment a process is killed in, a folder named `step_N` is whole; what happens to it later, its manifest shows.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelinerl.checkpoint.manifest import FileRecord, Manifest, read_manifest, secure_folder, verify, write_manifest
from pipelinerl.errors import DataError

FOLDER = "checkpoints"
LATEST = "latest"
PARTIAL = ".partial"
_NAME = re.compile(r"step_(\d{6,})")


def step_name(step: int) -> str:
    """`step_000050`."""
    return f"step_{step:06d}"


@dataclass(frozen=True)
class CheckpointStore:
    """`folder` holds the checkpoints; the `keep_last` newest are kept, and with `keep_best` the best one."""

    folder: Path
    keep_last: int
    keep_best: bool = False

    def stage(self, step: int) -> Path:
        """A new folder in which to write the checkpoint of `step`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix=f"{step_name(step)}.", suffix=PARTIAL, dir=self.folder))
        path.chmod(0o755)  # mkdtemp keeps others out, who may be the trainer ranks or a colleague
        return path

    def commit(self, staged: Path, step: int, files: Mapping[str, FileRecord], metric: float | None = None) -> Path:
        """Make the staged folder, in which `files` are on the disk, the newest checkpoint; delete what is too many."""
        write_manifest(staged, Manifest(step, files, metric))
        target = self.folder / step_name(step)
        if target.exists():  # of a run that went this far before; it was resumed from an earlier step
            target.rename(Path(tempfile.mkdtemp(suffix=PARTIAL, dir=self.folder)) / target.name)
        staged.rename(target)
        secure_folder(self.folder)
        self._point_to(target.name)
        self._prune()
        return target

    def _point_to(self, name: str) -> None:
        staged = self.folder / f"{LATEST}{PARTIAL}"
        with staged.open("w") as file:
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())
        staged.replace(self.folder / LATEST)
        secure_folder(self.folder)

    def _prune(self) -> None:
        found = checkpoints_in(self.folder)
        kept = set(found[: self.keep_last])
        if self.keep_best and (best := _best(found)):
            kept.add(best)
        for path in [*found, *self.folder.glob(f"*{PARTIAL}")]:
            if path not in kept:
                shutil.rmtree(path)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, whole or damaged."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("step_*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def newest_whole(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint without damage; None when there is none at all.

    Damaged ones are named through `tell` and set aside as `step_N.damaged`. Raises DataError when all are damaged.
    """
    for path in folder.glob(f"step_*{PARTIAL}"):
        tell(f"{path} was left by a save that was cut short; it is not used")
    found = checkpoints_in(folder)
    for path in found:
        try:
            verify(path)
        except DataError as error:
            tell(f"damaged checkpoint: {error}; trying the one before")
            continue
        for damaged in found[: found.index(path)]:
            _set_aside(damaged)
        return path
    if found:
        raise DataError(f"{folder}: all {len(found)} checkpoint(s) are damaged; restore one, or choose another run_dir")
    return None


def _set_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _best(found: list[Path]) -> Path | None:
    """The one with the highest metric, the newer of two equals."""
    metrics: dict[Path, float] = {}
    for path in found:
        with contextlib.suppress(DataError):  # damaged ones are never the best
            if (metric := read_manifest(path).metric) is not None:
                metrics[path] = metric
    return max(metrics, key=lambda path: metrics[path], default=None)
