"""Seeded requests on vLLM's CPU build.

A sampler step draws for every row, also for those whose token is thrown away (a prefill that is not complete yet).
vLLM then turns the row's generator back by an offset, which only CUDA's generators have: on a CPU the engine dies with
"CPU Generator does not use offset". Here such a row keeps its generator out of the step instead, so that there is
nothing to turn back. On CUDA vLLM's own way is left as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np


class SeededWorker:
    """A part of the worker extension."""

    model_runner: Any

    def discarded_tokens_draw_nothing(self) -> None:
        """Make it so in this worker, if it runs on a CPU."""
        runner = self.model_runner
        if runner.device.type != "cpu":
            return
        sample_tokens = runner.sample_tokens

        @wraps(sample_tokens)
        def without_draws(*args: Any, **kwargs: Any) -> Any:
            with _kept_out(runner):
                return sample_tokens(*args, **kwargs)

        runner.sample_tokens = without_draws


@contextmanager
def _kept_out(runner: Any) -> Iterator[None]:
    """Take the generators of rows whose token is discarded out of the batch, and put them back."""
    generators = runner.input_batch.generators
    if not generators:  # also before a step without rows
        yield
        return
    rows = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0].tolist()
    kept = {row: generators.pop(row) for row in rows if row in generators}
    try:
        yield
    finally:
        generators.update(kept)
