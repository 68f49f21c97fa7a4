"""The engine's half of a bisection: its residual stream for one token sequence.

`HiddenStatesWorker` is part of the worker extension, so its methods run inside vLLM's workers; `hidden_states` calls
them around the prefill of one request. Nothing else may run in the engine meanwhile. Only rank 0 of a tensor-parallel
engine records: after each block every rank has the whole stream.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.inputs import tokens_input
from vllm.v1.engine.async_llm import AsyncLLM

from pipelinerl.errors import EnvironmentProblem
from pipelinerl.parity.residual_stream import ResidualStream
from pipelinerl.types import FloatArray

_numbers = itertools.count()


class HiddenStatesWorker:
    """Mixed into a vLLM worker. Arguments and results are plain data, as vLLM's RPC wants them."""

    _hidden_states_stream: ResidualStream | None = None

    def hidden_states_begin(self) -> str:
        """Record from here on. Returns what is wrong with this model, "" when nothing is."""
        if self.rank == 0:  # type: ignore[attr-defined]
            try:
                self._hidden_states_stream = ResidualStream(self.get_model())  # type: ignore[attr-defined]
            except EnvironmentProblem as problem:
                return str(problem)
        return ""

    def hidden_states_take(self) -> list[Any]:
        """Stop. Returns (shape, float32 bytes) of each place; nothing on ranks other than 0."""
        stream, self._hidden_states_stream = self._hidden_states_stream, None
        return [] if stream is None else [[list(part.shape), part.numpy().tobytes()] for part in stream.take()]


async def hidden_states(llm: AsyncLLM, tokens: Sequence[int]) -> list[FloatArray]:
    """[tokens, hidden] float32 after the embedding, after each block and after the final norm, by the served weights.

    `tokens` leave room for one more in the engine's context. Raises EnvironmentProblem when the engine compiles its
    model, which leaves no place to look into, or when the model's blocks are not where they are looked for.
    """
    if not llm.vllm_config.model_config.enforce_eager:
        raise EnvironmentProblem(
            "engine.enforce_eager=false: a compiled model hides its blocks; set engine.enforce_eager=true to see them"
        )
    name = f"hidden-states-{next(_numbers)}"
    problem = (await llm.collective_rpc("hidden_states_begin"))[0]
    if problem:
        raise EnvironmentProblem(problem)
    try:
        # A salt of its own keeps the prefix cache, which would leave out tokens, away.
        inputs = tokens_input(list(tokens), cache_salt=name)
        async for _ in llm.generate(inputs, SamplingParams(temperature=0.0, max_tokens=1, detokenize=False), name):
            pass
    finally:
        taken = (await llm.collective_rpc("hidden_states_take"))[0]
    recorded = [np.frombuffer(data, np.float32).reshape(shape) for shape, data in taken]
    counts = {len(part) for part in recorded}
    assert counts == {len(tokens)}, f"recorded {counts} positions of {len(tokens)}: something else ran in the engine"
    return recorded
