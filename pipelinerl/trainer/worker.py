"""One trainer rank. A plain class: the cluster layer makes it a Ray actor, one per rank.

Its life: `setup` on all ranks at once, `listen` and `connect` for the weight transport (rank 0 sends), then `step` and
`send_weights` in turns, and `export` at the end. Calls run one after another, in the order they were made.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipelinerl.batch.record import read_batch
from pipelinerl.checkpoint.manifest import FileRecord
from pipelinerl.config.schema import RunConfig
from pipelinerl.trainer.backend import DeepSpeedBackend, init_process_group
from pipelinerl.trainer.checkpoint import Counters, Snapshot, restore
from pipelinerl.trainer.fragments import OptimizerView
from pipelinerl.trainer.hidden_states import hidden_states
from pipelinerl.trainer.lora import add_adapters, export_adapter
from pipelinerl.trainer.model import PolicyModel, compile_layers, export_policy, load_policy
from pipelinerl.trainer.nudge import Weights
from pipelinerl.trainer.recorder import BatchRecorder, joined
from pipelinerl.trainer.reference import Reference
from pipelinerl.trainer.rows import Row, make_rows
from pipelinerl.trainer.scoring import score_completions
from pipelinerl.trainer.sequence_parallel import SequenceShards
from pipelinerl.trainer.sharding import full_numel
from pipelinerl.trainer.source import make_source, state_dict_of, take_part
from pipelinerl.trainer.step import TrainStep
from pipelinerl.types import (
    FloatArray,
    RankBatch,
    RolloutGroup,
    SampleKL,
    ScoredSequence,
    ScoreRequest,
    StepResult,
)
from pipelinerl.weights.sender import Sender, make_sender
from pipelinerl.weights.source import WeightSource


class TrainerWorker:
    """Holds this rank's share of model and optimizer."""

    def __init__(self, config: RunConfig, rank: int, device: str):
        self._config = config
        self._rank = rank
        self._device = torch.device(device)
        self._version = 0
        self._policy: PolicyModel
        self._weights: Weights
        self._backend: DeepSpeedBackend
        self._sender: Sender | None = None
        self._reference: Reference | None = None
        self._source: WeightSource
        self._snapshot: Snapshot | None = None
        self._step: TrainStep | None = None  # that has begun
        self._parts: list[tuple[RankBatch, Sequence[RolloutGroup]]] = []  # of a step that comes in parts
        self._step_s = 0.0  # what it took so far, waits between its calls left out
        self._recorder: BatchRecorder | None = None

    def setup(self, address: str, port: int) -> dict[str, Any]:
        """Join the other ranks at `address:port` and load the model. Returns what there is to log about it."""
        config = self._config
        torch.manual_seed(config.seed)
        init_process_group(
            self._device, self._rank, config.trainer.ranks, address, port, timeout_s=config.trainer.step_timeout_s
        )
        policy = load_policy(
            config.model,
            config.sampling.temperature,
            config.trainer.logprob_chunk,
            config.trainer.gradient_checkpointing,
            config.trainer.attention,
            self._device,
        )
        if config.trainer.lora.rank:
            add_adapters(policy.hf, config.trainer.lora, config.seed)
        if config.trainer.sequence_parallel > 1:
            policy.shards = SequenceShards(policy.hf, config.trainer.sequence_parallel)
        if config.trainer.compile:
            compile_layers(policy)
        updates = config.steps * config.batch.updates
        bf16 = config.model.dtype == "bfloat16"
        self._backend = DeepSpeedBackend(policy, config.trainer, bf16, updates, self._device)
        self._policy = policy
        self._weights = Weights(policy)
        if config.algo.kl.on:
            self._reference = Reference.load(config, self._device, policy.hf.config.vocab_size)
        self._source = make_source(policy.hf, config.weights.bucket_mb * 2**20)
        return {
            "parameters": sum(map(full_numel, policy.parameters())),
            "trained_parameters": sum(full_numel(p) for p in policy.parameters() if p.requires_grad),
            "dtype": config.model.dtype,
            "head_dtype": str(policy.head_dtype).removeprefix("torch."),
            "temperature": policy.temperature,
            "tied_head": bool(policy.hf.config.tie_word_embeddings),
        }

    def listen(self, backend: str, address: str) -> dict[str, Any]:
        """Rank 0 only: leave the weight transport's group there was and open another. Returns what engines need."""
        weights = self._config.weights
        if self._sender is None:
            self._sender = make_sender(backend, self._source, weights.timeout_s, weights.shared_memory)
        return self._sender.listen(address)

    def connect(self, world_size: int) -> dict[str, Any]:
        """Rank 0 only: wait for all engine workers. Returns the manifest of every update, as plain lists."""
        assert self._sender is not None, "listen comes first"
        self._sender.connect(world_size)
        return self._source.manifest.to_dict()

    def send_weights(self, transmission: int) -> dict[str, Any]:
        """Send the current weights from rank 0; the other ranks take part where the weights are sharded. Rank 0 returns
        its seconds and, with the canary on, the `digests` of all parameters in the order of the manifest.

        The weights may change when this returns: what has not left by then has been copied. Raises WeightSyncError.
        """
        if self._rank:
            take_part(self._source)
            return {}
        assert self._sender is not None, "listen comes first"
        start = time.perf_counter()
        canary = self._config.parity.canary
        digests = self._sender.send(transmission, with_digests=canary)
        sent: dict[str, Any] = {"seconds": time.perf_counter() - start}
        return sent | {"digests": digests} if canary else sent

    def resend_weights(self, transmission: int) -> None:
        """Rank 0 only: send what was sent last once more, in a new group."""
        assert self._sender is not None, "listen comes first"
        self._sender.resend(transmission)

    def step(self, updates: Sequence[RankBatch], *payloads: RolloutGroup) -> StepResult:
        """This rank's share of a step, of one or more optimizer updates. `payloads[i]` is the group that
        `SampleRef.group == i` names."""
        self.begin_step()
        if self._recorder:
            self._recorder.begin(self._version + 1, updates, payloads)
        with self._in_step() as step:
            step.train(self._rows(updates, payloads))
            ended = step.finish()
        return self._end_step(*ended)

    def begin_step(self) -> None:
        """The first of a step that comes in parts: then `accumulate`, once or more, and `finish_step`. What may come
        between them changes no weight and trains on nothing."""
        assert not self._weights.nudged, "a probe must take its nudge back before a step"
        assert self._step is None, "the step before is not finished"
        self._step, self._step_s = TrainStep(self._backend, self._version, self._config), 0.0
        self._parts.clear()

    def accumulate(self, batch: RankBatch, last: bool, *payloads: RolloutGroup) -> None:
        """Add up the gradient of this rank's part of some groups; `payloads` as in `step`. `last`: of all groups."""
        with self._in_step() as step:
            (rows,) = self._rows([batch], payloads)
            step.accumulate(rows, last=last)
        self._parts.append((batch, payloads))

    def finish_step(self, scale: float) -> StepResult:
        """The optimizer update of what was accumulated, times `scale`: what the weights of the samples have too
        little, because their denominator was not known before the last group was (see streamed.py)."""
        if self._recorder:
            self._recorder.begin(self._version + 1, *joined(self._parts), scale)
        with self._in_step() as step:
            step.update(scale)
            ended = step.finish()
        return self._end_step(*ended)

    def _rows(self, updates: Sequence[RankBatch], payloads: Sequence[RolloutGroup]) -> list[list[Row]]:
        rows = [make_rows(batch, payloads) for batch in updates]
        return self._reference.added_to(rows) if self._reference else rows

    @contextmanager
    def _in_step(self) -> Iterator[TrainStep]:
        """The step that has begun, on the clock."""
        assert self._step is not None, "begin_step comes first"
        start = time.perf_counter()
        yield self._step
        self._step_s += time.perf_counter() - start

    def _end_step(self, applied: bool, metrics: dict[str, float]) -> StepResult:
        self._step = None
        self._version += 1
        if self._reference:
            self._reference.forget()
        return StepResult(self._version, metrics | {"perf/train_s": self._step_s}, applied)

    def record_batches(self, folder: str) -> None:
        """From now on write what every step trains on into `folder`."""
        self._recorder = BatchRecorder(Path(folder), self._rank)

    def finish_recording(self) -> None:
        """Wait until it is written. Raises EnvironmentProblem when it could not be."""
        if self._recorder:
            self._recorder.finish()

    def replay(self, folder: str, step: int) -> StepResult:
        """Do a recorded step. Raises DataError when it is not in `folder`."""
        assert step == self._version + 1, (step, self._version)
        batch = read_batch(Path(folder), step, self._rank)
        if batch.scale is None:
            return self.step(batch.updates, *batch.groups)
        self.begin_step()
        for number, part in enumerate(batch.updates, start=1):
            self.accumulate(part, number == len(batch.updates), *batch.groups)
        return self.finish_step(batch.scale)

    def reference_kl(self, updates: Sequence[RankBatch], *payloads: RolloutGroup) -> list[SampleKL]:
        """How far the engine's policy is from the reference on each of this rank's samples, groups numbered as in
        `updates`. The step that follows does not compute the reference again."""
        assert self._reference is not None, "a run without algo.kl has no reference policy"
        return self._reference.sample_kl(row for batch in updates for row in make_rows(batch, payloads))

    def snapshot(self, folder: str) -> None:
        """All ranks: copy this rank's part of the state and write it into `folder` in the background."""
        assert self._step is None, "a checkpoint has no place for half a step"
        assert not self._weights.nudged, "a probe must take its nudge back before a checkpoint"
        assert self._snapshot is None or self._snapshot.poll() is not None, "the snapshot before is still being written"
        view = OptimizerView(self._policy, self._backend.optimizer)
        counters = Counters(self._version, view.updates(), self._backend.scheduled, self._config.trainer.ranks)
        self._snapshot = Snapshot.begin(Path(folder), view, counters, self._rank, self._device)

    def checkpoint_poll(self) -> dict[str, FileRecord] | None:
        """The files that the snapshot became; None while it is written. Raises EnvironmentProblem when it failed."""
        assert self._snapshot is not None, "snapshot comes first"
        return self._snapshot.poll()

    def restore(self, folder: str) -> int:
        """All ranks: go on from a checkpoint. Returns its version. Raises ConfigError when it does not fit."""
        view = OptimizerView(self._policy, self._backend.optimizer)
        counters = restore(Path(folder), view, self._rank, self._config.trainer.ranks, self._device)
        self._backend.resume_schedule(counters.scheduled)
        self._version = counters.version
        return self._version

    def nudge(self) -> None:
        """All ranks: exchange the weights for a probe's second set, or the second set for the weights."""
        self._weights.use(not self._weights.nudged)

    def score(self, request: ScoreRequest, *payloads: RolloutGroup) -> list[ScoredSequence]:
        """The logprobs of the groups' completions; see trainer/scoring.py. Changes no weight.

        For rank 0 alone, or, where the weights are sharded, for all ranks at once.
        """
        rollouts = [rollout for group in payloads for rollout in group.rollouts]
        return score_completions(self._policy, rollouts, request, self._weights)

    def hidden_states(self, tokens: list[int]) -> list[FloatArray]:
        """The residual stream [tokens, hidden] at each place; see trainer/hidden_states.py. Ranks as in `score`."""
        return hidden_states(self._policy, tokens)

    def export(self, target: str) -> None:
        """Write the model and its tokenizer to `target`. Ranks as in `score`; rank 0 writes."""
        if self._rank:
            take_part(self._source)
        else:
            export_policy(self._policy, state_dict_of(self._source), self._config.model.path, Path(target))

    def export_adapter(self, target: str) -> None:
        """Write the adapter that is trained to `target`, for peft. Ranks as in `score`; rank 0 writes."""
        export_adapter(self._policy.hf, self._config.model.path, Path(target))
