"""The seed of every completion, from what it is and not from when it is sampled.

So a completion depends on the weights and its seed only, whatever else is in flight; and a group that a killed run has
to sample again becomes the same group.
"""

import hashlib
from typing import Literal

Purpose = Literal["train", "eval", "probe"]


def completion_seed(run_seed: int, purpose: Purpose, group: int, rollout: int, turn: int) -> int:
    """63 bits. Different for every argument that differs: training, evaluation and probes share no seed."""
    text = f"{run_seed}/{purpose}/{group}/{rollout}/{turn}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
