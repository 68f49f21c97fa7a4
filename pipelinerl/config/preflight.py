"""What can be known to fail before Ray starts, in the order in which a user would fix it."""

from pathlib import Path

from pipelinerl.config.device import Device, gpu_count, gpus_needed, resolve_device
from pipelinerl.config.schema import JsonlTask, RunConfig
from pipelinerl.errors import DataError, EnvironmentProblem

# Option of the group `task` -> option of the group `model`, and name of its directory, that `make-tiny` makes for it.
TINY_MODELS = {"sort": "tiny", "sort_scratchpad": "tiny_scratchpad", "sort_wide": "tiny_wide"}


def preflight(config: RunConfig, trainer: bool = True) -> None:
    """Check model, data and devices; without `trainer`, of a command that starts engines only.

    Raises: EnvironmentProblem for a missing model directory or missing GPUs, DataError for a missing data file.
    """
    _model_is_there(config)
    _data_is_there(config)
    gpus = gpu_count()
    _devices_suffice(config, resolve_device(config, gpus), gpus, trainer)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration with local paths that mean the same from every working directory."""
    model = config.model
    if _is_local(model.path):
        model = model.model_copy(update={"path": str(Path(model.path).resolve())})
    task = config.task
    if isinstance(task, JsonlTask):
        eval_path = None if task.eval_path is None else str(Path(task.eval_path).resolve())
        task = task.model_copy(update={"path": str(Path(task.path).resolve()), "eval_path": eval_path})
    return config.model_copy(update={"model": model, "task": task})


def _model_is_there(config: RunConfig) -> None:
    path = config.model.path
    directory = Path(path)
    if not _is_local(path):
        return
    if not directory.exists():
        commands = {name: f"pipelinerl make-tiny --task {task}" for task, name in TINY_MODELS.items()}
        command = commands.get(directory.name)
        hint = f"run: {command}" if command else "name a model directory, or a hub id such as Qwen/Qwen2.5-0.5B"
        raise EnvironmentProblem(f"model.path={path}: no such directory (from {Path.cwd()}); {hint}")
    if not (directory / "config.json").is_file():
        raise EnvironmentProblem(f"model.path={path}: no model directory, it has no config.json")


def _is_local(path: str) -> bool:
    """True when `path` cannot be a hub id (`name` or `owner/name`), or the first part of it is a directory here."""
    if path.startswith(("/", ".", "~", "models/")) or path.endswith("/") or path.count("/") > 1:
        return True
    return Path(path.partition("/")[0]).is_dir()


def _data_is_there(config: RunConfig) -> None:
    if not isinstance(config.task, JsonlTask):
        return
    for key, path in (("task.path", config.task.path), ("task.eval_path", config.task.eval_path)):
        if path is not None and not Path(path).is_file():
            raise DataError(f"{key}={path}: no such file (from {Path.cwd()}); set {key}=FILE (JSON lines)")


def _devices_suffice(config: RunConfig, device: Device, gpus: int, trainer: bool) -> None:
    if device == "cpu":
        if config.engine.kv_cache_mb is None:
            raise EnvironmentProblem("engine.kv_cache_mb=null on CPU: the size must be given; use engine=cpu")
    elif config.cluster.address == "local" and gpus < (needed := gpus_needed(config, trainer)):
        engines = "(engine.count + 1 to evaluate)" if config.engines > config.engine.count else "engine.count"
        ranks = " + trainer.ranks" if trainer else ""
        raise EnvironmentProblem(
            f"{needed} GPUs needed ({engines} x engine.tensor_parallel{ranks}), "
            f"this machine has {gpus}; lower them, or join a cluster with cluster=ray"
        )
