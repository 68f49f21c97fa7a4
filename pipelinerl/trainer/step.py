"""One step on one rank: its optimizer updates in turn, and what all ranks together say of them.

    begin ──> accumulate, accumulate, ... ──> update ──> (the next update's) ... ──> finish

A step that is whole when it begins accumulates once for each update. One whose groups are still arriving
(`batch.stream`) accumulates what there is, and waits for nothing in between: gradients, sums and losses only add up.

The loss of an update is the sum of its token losses times their weights, which hold what it is a mean over (see
algo/aggregation.py). Each micro-batch contributes its part times `world_size`, which DeepSpeed's mean over ranks
cancels. So the gradient does not depend on ranks, micro-batches or packing.

M = the sampled tokens of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipelinerl.algo.diagnostics import Sums, token_sums
from pipelinerl.algo.objective import Coefficients, Objective, Tokens, objective
from pipelinerl.algo.proximal import proximal_logprobs, proximal_of
from pipelinerl.config.schema import AlgoConfig, RunConfig
from pipelinerl.trainer.backend import DeepSpeedBackend
from pipelinerl.trainer.rows import Row, forward_inputs


class TrainStep:
    """An optimizer step that has begun.

    Metrics of tokens are over all updates. `optim/skipped` counts the updates that were skipped because something was
    not finite; the rest of `optim/*` is of the last update.
    """

    def __init__(self, backend: DeepSpeedBackend, version: int, config: RunConfig):
        """`version` is that of the weights before the step; the coefficients are those of step `version + 1`."""
        self._backend = backend
        self._config = config
        self._terms = _Terms(config.algo, version, Coefficients.at(config.algo, version + 1, config.steps))
        self._sums = Sums.zero(backend.device)
        self._loss = _no_loss(backend)  # of the update in hand, or of the last one
        self._accumulating = False  # there is an update in hand
        self._updates = self._skipped = 0
        self._optim: dict[str, float] = {}  # of the last update, but for its loss

    def train(self, updates: Sequence[Sequence[Row]]) -> None:
        """All updates of a step that is whole, [update][row]."""
        for rows, starts in zip(updates, _start_logprobs(self._backend, updates, self._config.algo), strict=True):
            self.accumulate(rows, starts)
            self.update()

    def accumulate(self, rows: Sequence[Row], starts: Sequence[Tensor | None] | None = None, last: bool = True) -> None:
        """Add up the gradient of this rank's rows, as many as on every other rank.

        Args:
            rows: at least one.
            starts: as of `_start_logprobs`; None: no row has any.
            last: `update` follows.
        """
        if not self._accumulating:
            self._accumulating, self._loss = True, _no_loss(self._backend)
        for index, (row, start) in enumerate(zip(rows, starts or [None] * len(rows), strict=True)):
            at_end = last and index == len(rows) - 1
            tokens, found, gradient = _micro_batch(self._backend, row, start, self._terms, last=at_end)
            self._loss += found.loss.detach().double()
            self._sums += token_sums(tokens, found, gradient, self._config.algo.correction, first=not self._updates)

    def update(self, scale: float = 1.0) -> None:
        """The optimizer update of what was accumulated, and its loss, times `scale`."""
        lr = self._backend.lr
        applied, grad_norm = self._backend.step(scale)
        self._loss *= scale
        self._updates += 1
        self._accumulating = False
        self._skipped += not applied
        self._optim = {"optim/grad_norm": grad_norm, "optim/lr": lr}

    def finish(self) -> tuple[bool, dict[str, float]]:
        """(applied, metrics) of the step, the same on all ranks. Applied means that any of its updates was."""
        loss, sums = self._loss, self._sums
        if dist.get_rank() % self._config.trainer.sequence_parallel:  # ranks that share rows: one speaks for all
            loss.zero_()
            sums.totals.zero_()
        dist.all_reduce(loss)
        dist.all_reduce(sums.totals)
        dist.all_reduce(sums.maxima, op=dist.ReduceOp.MAX)
        metrics = {
            **sums.finish(),
            **self._terms.coefficients.metrics(self._config.algo),
            "optim/loss": float(loss),
            **self._optim,
            "optim/skipped": float(self._skipped),
        }
        return self._skipped < self._updates, metrics


def _no_loss(backend: DeepSpeedBackend) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=backend.device)


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the objective of a step consists of."""

    algo: AlgoConfig
    version: int
    coefficients: Coefficients


def _micro_batch(
    backend: DeepSpeedBackend, row: Row, start: Tensor | None, terms: _Terms, *, last: bool
) -> tuple[Tokens, Objective, Tensor]:
    """Accumulate the gradient of a row. Returns its tokens, its objective, and d loss / d logprob of the tokens [M].

    The loss is differentiated in two parts: down to logprobs and entropies, which is cheap and gives the diagnostics
    their gradient per token, and from there through the model, with the first part's gradients as constants. (In one
    part that gradient could not be had: DeepSpeed takes any at the model's outputs for the start of its own backward
    pass.)
    """
    with_entropy = terms.coefficients.entropy > 0
    outputs = backend.forward(*forward_inputs(row, backend.device), entropy_grad=with_entropy)
    tokens = _tokens(row, outputs, start, terms)
    found = objective(tokens, terms.algo, terms.coefficients)
    leaves = (tokens.logprobs_new, tokens.entropy) if with_entropy else (tokens.logprobs_new,)
    gradients = torch.autograd.grad(found.loss, leaves)
    through_model = outputs[0].sum() * 0.0  # of a dummy this is all: zero gradients, and the same collectives
    for output, gradient in zip(outputs, gradients, strict=False):
        through_model = through_model + (output[: len(gradient)] * gradient).sum()
    # A non-finite loss can have a finite gradient (a clamp cuts it off). Make every gradient NaN, so that the check of
    # the whole gradient, which is agreed on over all ranks, skips the update.
    if not torch.isfinite(found.loss):
        through_model = outputs[0].sum() * math.nan
    backend.backward(through_model * dist.get_world_size(), last=last)
    return tokens, found, gradients[0]


def _tokens(row: Row, outputs: tuple[Tensor, Tensor], start: Tensor | None, terms: _Terms) -> Tokens:
    """The sampled tokens of a row. Logprobs and entropies are copies, from which gradients go no further."""
    batch, device = row.batch, outputs[0].device

    def sampled(values: object) -> Tensor:
        return torch.as_tensor(values, device=device)[row.positions]

    logprobs, entropy = (output.detach()[: len(row.positions)] for output in outputs)
    rollout, lag = sampled(batch.logprobs), terms.version - sampled(batch.versions)
    return Tokens(
        logprobs_new=logprobs.requires_grad_(),
        entropy=entropy.requires_grad_(terms.coefficients.entropy > 0),
        logprobs_old=proximal_logprobs(proximal_of(terms.algo), logprobs, rollout, lag, start),
        logprobs_rollout=rollout,
        logprobs_reference=None if row.reference is None else torch.as_tensor(row.reference, device=device),
        advantages=sampled(batch.advantages),
        weights=sampled(batch.weights),
        sequence=sampled(batch.sequence),
        lag=lag,
    )


@torch.no_grad()
def _start_logprobs(
    backend: DeepSpeedBackend, updates: Sequence[Sequence[Row]], algo: AlgoConfig
) -> list[list[Tensor | None]]:
    """[update][row] the logprobs [M] under the weights before the step, where the objective asks for them and they are
    not those of the update's own forward pass: from the second update on, with `proximal=recompute`."""

    def start(row: Row) -> Tensor | None:
        logprobs: Tensor = backend.forward(*forward_inputs(row, backend.device))[0]
        return logprobs[: len(row.positions)]

    if proximal_of(algo) != "recompute":
        return [[None] * len(rows) for rows in updates]
    return [[start(row) if number else None for row in rows] for number, rows in enumerate(updates)]
