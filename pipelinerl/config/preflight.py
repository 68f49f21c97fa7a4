"""What can be known to fail before Ray starts, in the order in which a user would fix it."""

from pathlib import Path

from pipelinerl.config.device import resolve_device
from pipelinerl.config.footprint import read_json
from pipelinerl.config.schema import JsonlTask, RunConfig
from pipelinerl.errors import DataError, EnvironmentProblem

# Option of the group `task` -> option of the group `model`, and name of its directory, that `make-tiny` makes for it.
TINY_MODELS = {"sort": "tiny", "sort_scratchpad": "tiny_scratchpad", "sort_wide": "tiny_wide"}


def preflight(config: RunConfig) -> None:
    """Check model and data, and what depends on the device. Whether there is room is checked by cluster/fit.py.

    Raises: EnvironmentProblem for a model that is not there or too short, DataError for a missing data file.
    """
    _model_is_there(config)
    _model_is_long_enough(config)
    _data_is_there(config)
    if config.engine.kv_cache_mb is None and config.cluster.address == "local" and resolve_device(config) == "cpu":
        raise EnvironmentProblem("engine.kv_cache_mb=null on CPU: the size must be given; use engine=cpu")


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


def local_inputs(config: RunConfig) -> list[str]:
    """Paths that every node must see, of a configuration with absolute ones."""
    task = config.task
    data = [task.path, task.eval_path] if isinstance(task, JsonlTask) else []
    paths = [config.model.path, config.algo.kl.reference if config.algo.kl.on else None, *data]
    return [path for path in paths if path is not None and path.startswith("/")]


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


def _model_is_long_enough(config: RunConfig) -> None:
    """Where its positions are neither scaled nor unlimited, and vLLM would refuse after a minute."""
    file = Path(config.model.path) / "config.json"
    if not file.is_file():
        return
    model = read_json(file)
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    longest = model.get("max_position_embeddings")
    if longest and rope.get("rope_type", "default") == "default" and config.engine.max_model_len > longest:
        raise EnvironmentProblem(
            f"engine.max_model_len={config.engine.max_model_len}: the model has {longest} positions "
            f"(max_position_embeddings in {file}); set engine.max_model_len={longest} or less"
        )


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
