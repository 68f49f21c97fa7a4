"""Who needs what: one Ray bundle per process, computed from the config alone."""

from dataclasses import dataclass

from pipelinerl.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Bundle:
    """The resources of one process."""

    name: str
    cpus: float
    gpus: int

    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": float(self.gpus)} if self.gpus else {})


def bundles(config: RunConfig, device: str, cpus: float) -> tuple[list[Bundle], list[Bundle]]:
    """Bundles of the trainer ranks and of the engines, for a cluster with `cpus` cores.

    A process asks for one core, or for its equal share where there are more processes than cores; only on GPUs do
    processes compete for something that cannot be shared.
    """
    gpus = device == "cuda"
    processes = config.trainer.ranks + config.engines
    share = min(1.0, int(100 * cpus / processes) / 100)
    trainers = [Bundle(f"trainer rank {i}", share, int(gpus)) for i in range(config.trainer.ranks)]
    engines = [
        Bundle(f"engine {i}", share, config.engine.tensor_parallel if gpus else 0) for i in range(config.engines)
    ]
    return trainers, engines
