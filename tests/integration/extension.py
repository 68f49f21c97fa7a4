"""The worker extension of an engine that shows its hidden states. Apart, because vLLM's processes import it by name."""

from pipelinerl.engine.extension import WorkerExtension
from pipelinerl.engine.hidden_states import HiddenStatesWorker


class Extension(WorkerExtension, HiddenStatesWorker):
    """What `WorkerExtension` does, and `hidden_states`."""
