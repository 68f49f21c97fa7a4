"""The frozen reference policy of a KL term: a copy of its own in every trainer rank.

It is loaded once, whole on every rank whatever the ZeRO stage, and never trained. With `algo.kl.offload` it stays in
host memory and is on the device only while it computes.

What it has computed is kept per rollout until the step is over: a KL in the reward is needed before the advantages are
known, and again when they are applied.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pipelinerl.algo.kl import to_go
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ConfigError, EnvironmentProblem
from pipelinerl.trainer.model import PolicyModel, load_policy
from pipelinerl.trainer.rows import Key, Row, forward_inputs
from pipelinerl.types import FloatArray, SampleKL


class Reference:
    """Logprobs of sampled tokens under the reference policy, at the temperature at which they were sampled."""

    def __init__(self, policy: PolicyModel, device: torch.device, offload: bool):
        self._policy = policy.requires_grad_(False).eval()
        self._device = device
        self._home = torch.device("cpu") if offload else device
        self._policy.to(self._home)
        self._known: dict[Key, FloatArray] = {}

    @classmethod
    def load(cls, config: RunConfig, device: torch.device, vocabulary: int) -> "Reference":
        """The reference of `algo.kl`.

        Raises:
            EnvironmentProblem: it cannot be loaded.
            ConfigError: its vocabulary has not the size of the policy's, `vocabulary`.
        """
        path = config.algo.kl.reference or config.model.path
        source = config.model.model_copy(update={"path": path})
        try:
            policy = load_policy(source, config.sampling.temperature, config.trainer.logprob_chunk, False)
        except EnvironmentProblem as error:  # it names the key of the policy
            key = "algo.kl.reference" if config.algo.kl.reference else "model.path"
            raise EnvironmentProblem(str(error).replace("model.path", key, 1)) from error
        found = policy.hf.config.vocab_size
        if found != vocabulary:
            raise ConfigError(
                f"algo.kl.reference={path} has a vocabulary of {found} tokens, model.path={config.model.path} one of "
                f"{vocabulary}: a reference must know the same tokens"
            )
        return cls(policy, device, config.algo.kl.offload)

    def added_to(self, updates: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows [update][row] with the reference's logprobs, and `kl_to_go` applied."""
        self._compute(row for rows in updates for row in rows)
        return [[row.with_reference([self._known[key] for key in row.keys]) for row in rows] for rows in updates]

    def sample_kl(self, rows: Iterable[Row]) -> list[SampleKL]:
        """One record for each sample of the rows."""
        rows = list(rows)
        self._compute(rows)
        found = []
        for row in rows:
            engine = row.split(row.batch.logprobs[row.batch.loss_mask])
            for ref, key, logprobs in zip(row.refs, row.keys, engine, strict=True):
                kl = to_go(logprobs - self._known[key])
                total = float(kl[0]) if len(kl) else 0.0
                found.append(SampleKL(ref.group, ref.rollout, total, float(kl.sum()), float((kl * kl).sum())))
        return found

    def forget(self) -> None:
        """The step is over: nothing that was computed for it is needed again."""
        self._known.clear()

    @torch.no_grad()
    def _compute(self, rows: Iterable[Row]) -> None:
        missing = [row for row in rows if not self._known.keys() >= set(row.keys)]
        if not missing:
            return
        with self._on_device():
            for row in missing:
                logprobs = self._policy(*forward_inputs(row, self._device))[0].float().cpu().numpy()
                self._known |= zip(row.keys, row.split(logprobs), strict=True)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self._policy.to(self._device)
        try:
            yield
        finally:
            self._policy.to(self._home)
