"""What we add to vLLM's workers, on every device. vLLM imports it by name in each of its worker processes.

Importing it registers our transports too, before the worker makes its transfer engine.
"""

import pipelinerl.weights.ipc
import pipelinerl.weights.nccl  # noqa: F401  registers the transport, as weights.ipc and weights.gloo do
from pipelinerl.engine.hidden_states import HiddenStatesWorker
from pipelinerl.engine.kv_policy import KVPolicyWorker
from pipelinerl.engine.seeded import SeededWorker
from pipelinerl.stacks import answer_as_told
from pipelinerl.weights.canary import CanaryWorker
from pipelinerl.weights.gloo import StagedUpdates
from pipelinerl.weights.loading import PausedUpdates

answer_as_told("worker of an engine")


class WorkerExtension(CanaryWorker, StagedUpdates, PausedUpdates, HiddenStatesWorker, KVPolicyWorker, SeededWorker):
    """Named as `worker_extension_cls`: its methods become the worker's own, callable through `collective_rpc`."""

    def pulse(self) -> None:
        """Show that the worker answers."""
