"""NCCL between GPUs: the receiving end, in every vLLM worker.

It is vLLM's, whose wait for a broadcast has no end: when one member of the group dies, NCCL keeps the others, and with
them the threads in which they sample. Here the wait ends after weights.timeout_s, or when the worker is told to leave:
a thread listens at a mailbox, as vLLM itself takes no call meanwhile, and aborts the communicator.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from pipelinerl.errors import WeightSyncError, first_line
from pipelinerl.mailbox import Mailbox
from pipelinerl.weights.device_senders import UNUSABLE

NAME = "patient_nccl"  # vLLM has an "nccl" of its own


@dataclass(kw_only=True)
class NcclInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's, and how long a broadcast may take."""

    timeout_s: float


class NcclEngine(NCCLWeightTransferEngine):
    """One group at a time."""

    init_info_cls = NcclInitInfo

    _timeout_s = 0.0
    _exit: "_Exit | None" = None
    model_update_group: Any

    def init_transfer_engine(self, init_info: NcclInitInfo) -> None:
        super().init_transfer_engine(init_info)
        if self.model_update_group.disabled:
            raise WeightSyncError(f"worker {self.parallel_config.rank}: {UNUSABLE}")
        self._timeout_s, self._exit = init_info.timeout_s, _Exit(self.model_update_group)

    @property
    def leave_at(self) -> str:
        """The address at which it is told to give its group up."""
        return self._exit.address if self._exit is not None else ""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Raises WeightSyncError when not all has come in time."""
        assert self._exit is not None, "init_transfer_engine comes first"
        names = _Expected(update_info.names, self._exit)
        late = threading.Timer(self._timeout_s, self._exit.take)
        late.start()
        why = ""
        try:
            super().receive_weights(replace(update_info, names=names))
        except _GivenUp:
            pass
        except RuntimeError as error:
            why = first_line(error)
        finally:
            late.cancel()
        if self._exit.taken:
            why = f"it did not come within weights.timeout_s={self._timeout_s:g} s, or the worker was told to leave"
        if why:
            raise WeightSyncError(
                f"worker {self.parallel_config.rank}: the NCCL broadcast broke off near parameter "
                f"{names.last or names[0]}: {why}"
            )

    def shutdown(self) -> None:
        if self._exit is not None:
            self._exit.take()
        super().shutdown()


class _GivenUp(Exception):
    """The group is no more: a call of an aborted communicator is undefined."""


class _Exit:
    """Out of a group, from whichever thread and once; also for whoever posts anything to its address."""

    def __init__(self, group: Any):
        self._group = group
        self._lock = threading.Lock()
        self._told = Mailbox()
        self.address = self._told.address
        self.taken = False
        self._told.listen(lambda _: self.take(), "nccl")

    def take(self) -> None:
        """Abort the communicator: whoever waits in it waits no more."""
        with self._lock:
            if not self.taken:
                self.taken = True
                self._told.close()
                self._group.destroy()


class _Expected(list[str]):
    """Names that remember which of them was asked for last, and of which there are no more in a group given up."""

    def __init__(self, names: list[str], exit_: _Exit):
        super().__init__(names)
        self._exit = exit_
        self.last = ""

    def __iter__(self) -> Iterator[str]:
        for name in super().__iter__():
            if self._exit.taken:
                raise _GivenUp
            self.last = name
            yield name


if NAME not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(NAME, NcclEngine)
