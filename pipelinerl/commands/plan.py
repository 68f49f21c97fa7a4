"""`pipelinerl plan`: what a configuration comes to, who sits where, and whether it fits. Starts nothing."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipelinerl.commands.options import split_options
from pipelinerl.commands.output import say
from pipelinerl.errors import EXIT_DONE, EXIT_ENVIRONMENT, ConfigError

if TYPE_CHECKING:
    from pipelinerl.cluster.fit import Fit
    from pipelinerl.config.inventory import Inventory
    from pipelinerl.config.memory import Need
    from pipelinerl.config.plan import Rows
    from pipelinerl.config.schema import RunConfig

HARDWARE = ("--nodes", "--gpus-per-node", "--cpus-per-node", "--memory-gb", "--gpu-memory-gb")
OPTIONS = (*HARDWARE, "--help", "-h")


def main(arguments: list[str]) -> int:
    """Run `pipelinerl plan` and return its exit code: 3 when the run does not fit.

    Raises: ConfigError for wrong options or settings, EnvironmentProblem for a damaged model directory.
    """
    options, overrides = split_options(arguments, OPTIONS)
    if {"--help", "-h"} & options.keys():
        say(_help())
        return EXIT_DONE
    from pipelinerl.config.load import load_config

    config = load_config(overrides)
    fits = show_plan(config, _hardware(options))
    return EXIT_DONE if fits else EXIT_ENVIRONMENT


def show_plan(config: "RunConfig", hardware: "Inventory | None" = None) -> bool:
    """Print the plan for `hardware`, without it for what there is; whether the run fits, as far as that is known."""
    from pipelinerl.cluster.fit import fit
    from pipelinerl.config.device import resolve_backend
    from pipelinerl.config.inventory import this_machine
    from pipelinerl.config.plan import plan, tables

    elsewhere = hardware is None and config.cluster.address != "local"
    inventory = hardware or this_machine(config)
    found = fit(config, inventory)
    derived = plan(config, resolve_backend(config, found.device, found.placement.shares_gpu))
    lines = [f"plan of {config.name} (nothing is started)"]
    sections = [*tables(derived)]
    parity = sections.pop()
    sections += [("who sits where", _seats(config, found, inventory, elsewhere)), ("memory", _memory(config, found))]
    for title, rows in [*sections, parity]:
        lines += ["", title, *(f"  {label:<22} {value}" for label, value in rows)]
    problems = () if elsewhere else found.problems
    if problems or found.warnings:
        lines += ["", *(f"PROBLEM  {problem}" for problem in problems)]
        lines += [f"warning  {warning}" for warning in (() if elsewhere else found.warnings)]
    say("\n".join(lines))
    return not problems


def _hardware(options: Mapping[str, str]) -> "Inventory | None":
    """The inventory that the options describe; None without any."""
    from pipelinerl.config.inventory import GB, uniform

    given = {name: value for name, value in options.items() if name in HARDWARE}
    if not given:
        return None
    numbers = {name: _number(name, value) for name, value in given.items()}
    memory, gpu_memory = numbers.get("--memory-gb"), numbers.get("--gpu-memory-gb")
    gpus = int(numbers.get("--gpus-per-node", 0))
    return uniform(
        nodes=int(numbers.get("--nodes", 1)),
        cpus=numbers.get("--cpus-per-node", max(1, 8 * gpus)),
        gpus=gpus,
        memory=None if memory is None else int(memory * GB),
        gpu_memory=None if gpu_memory is None else int(gpu_memory * GB),
    )


def _number(name: str, text: str) -> float:
    whole = name in ("--nodes", "--gpus-per-node")
    try:
        number = float(int(text) if whole else float(text))
    except ValueError:
        number = -1.0
    if not (0 <= number < float("inf")) or (number == 0 and name != "--gpus-per-node"):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name}={text}: should be {kind} above 0, as in {name}=2")
    return number


def _seats(config: "RunConfig", found: "Fit", inventory: "Inventory", elsewhere: bool) -> "Rows":
    from pipelinerl.cluster.placement import Demand

    engine, trainer = config.engine, config.trainer
    width = f"TP {engine.tensor_parallel}" + (f" x PP {engine.pipeline_parallel}" * (engine.pipeline_parallel > 1))
    rows = [
        ("device", found.device),
        ("engines", f"{engine.count}, each {width}"),
        ("trainer", f"{trainer.ranks} rank(s), ZeRO {trainer.zero_stage}"),
    ]
    if found.device == "cuda":
        rows.append(("GPUs needed", "1, shared" if found.placement.shares_gpu else str(Demand.of(config).units)))
    if elsewhere:
        where = f"decided when the cluster at {config.cluster.address} is joined; see pipelinerl plan --help"
        return [*rows, ("nodes", where)]
    gpus = f" and {inventory.gpus} GPU(s)" if found.device == "cuda" else ""
    rows.append(("there", f"{len(inventory.nodes)} node(s) with {inventory.cpus:g} core(s){gpus}"))
    for node, processes in found.placement.by_node().items():
        for process in processes:
            devices = f"{process.cpus:g} core(s)"
            if process.gpus:
                devices += f", {process.gpus:g} GPU(s)"
            rows.append((node.name if process is processes[0] else "", f"{process.name:<16} {devices}"))
    if len(inventory.nodes) > 1 and config.cluster.address == "local":
        rows.append(("", "cluster.address=local uses one node; join a cluster of them with cluster=ray"))
    return rows


def _memory(config: "RunConfig", found: "Fit") -> "Rows":
    from pipelinerl.config.memory import engine_need, kv_tokens, trainer_need
    from pipelinerl.config.quantity import in_bytes

    size = found.size
    if size is None:
        return [("parameters", f"unknown: model not local ({config.model.path})")]
    trained = f", {size.trained:,} trained" if size.trained != size.parameters else ""
    engines = found.placement.engines
    gpu_memory = engines[0].node.gpu_memory if engines else None
    engine = engine_need(config, size, found.device, gpu_memory)
    rows = [
        ("parameters", f"{size.parameters:,}{trained}"),
        ("keys and values", f"{in_bytes(size.kv_per_token)} a token" if size.kv_per_token else "unknown"),
        *_need_rows("a trainer rank", trainer_need(config, size, found.device), found.device),
        *_need_rows("an engine", engine, found.device),
    ]
    if (tokens := kv_tokens(config, size, engine)) is not None:
        whole = tokens // config.engine.max_model_len
        rows.append(("", f"its KV cache holds {tokens:,} tokens, {whole:,} sequences of engine.max_model_len"))
    return rows


def _need_rows(who: str, need: "Need", device: str) -> "Iterator[tuple[str, str]]":
    """What is certain and what is estimated, for each device and for the host."""
    from pipelinerl.config.quantity import in_bytes

    each = f"each of {need.devices} {'GPUs' if device == 'cuda' else 'workers'}: " if need.devices > 1 else ""
    for host in (False, True):
        items = [item for item in need.items if item.host == host]
        total = need.on_host() if host else need.on_device()
        certain = " + ".join(f"{item.name} {in_bytes(item.bytes)}" for item in items if item.certain)
        rest = " + ".join(f"{item.name} {in_bytes(item.bytes)}" for item in items if not item.certain)
        if total:
            about = f"; about {rest}" if certain and rest else f"about {rest}" if rest else ""
            yield (who, f"{each}{in_bytes(total)}{' of host memory' if host else ''} = {certain}{about}")
            who = ""
    yield from (("", f"unknown: {what}") for what in need.unknown)


def _help() -> str:
    return """\
usage: pipelinerl plan [options] [key=value ...]

Show what a configuration comes to: quantities of a step, who sits where, and how much memory every process needs.
Takes the same settings as pipelinerl train and starts nothing. Exit code 3: it does not fit (PROBLEM lines say what
lacks); a warning is about estimates and keeps nothing from starting.

options: hardware that is not here; without any of them, this machine
  --nodes=N            nodes (1)
  --gpus-per-node=N    GPUs of each (0)
  --cpus-per-node=N    cores of each (8 for every GPU)
  --memory-gb=N        main memory of each, 10^9 bytes (not known: not checked)
  --gpu-memory-gb=N    memory of each GPU, 10^9 bytes (not known: not checked)
  --help               this text

examples:
  pipelinerl plan
  pipelinerl plan --nodes=2 --gpus-per-node=8 --gpu-memory-gb=80 experiment=math_7b_8gpu cluster=ray engine.count=12"""
