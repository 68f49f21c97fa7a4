#!/usr/bin/env python
"""How full the packed forward passes are, and how evenly the ranks are loaded.

    python scripts/bench/packing.py

Lengths are log-normal and seeded. Fill is tokens over (micro-batches times `trainer.micro_batch_tokens`), imbalance the
tokens of the fullest rank over the mean. Every rank runs the same number of micro-batches, so their number is rounded
up to a multiple of the ranks, which no packing can avoid: `best fill` is what that leaves if passes could be filled to
the last token. `lockstep` is the imbalance when ranks wait for each other after each micro-batch.

Exit code 1 when a step misses the targets given as options.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass

import numpy as np

from pipelinerl.batch.packing import pack


@dataclass(frozen=True)
class Measured:
    micro_batches: int  # over all ranks
    fill: float
    best_fill: float
    imbalance: float
    lockstep: float
    seconds: float


def measure(lengths: list[int], ranks: int, limit: int) -> Measured:
    start = time.perf_counter()
    packed = pack(lengths, ranks, limit)
    seconds = time.perf_counter() - start
    loads = np.array([[sum(lengths[i] for i in micro_batch) for micro_batch in rank] for rank in packed])
    tokens = sum(lengths)
    fewest = math.ceil(math.ceil(tokens / limit) / ranks) * ranks
    return Measured(
        micro_batches=loads.size,
        fill=tokens / (loads.size * limit),
        best_fill=tokens / (fewest * limit),
        imbalance=float(loads.sum(axis=1).max() / (tokens / ranks)),
        lockstep=float(loads.max(axis=0).sum() / (tokens / ranks)),
        seconds=seconds,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048, help="of a step: 128 prompts x 16 completions")
    parser.add_argument("--median", type=float, default=1000, help="tokens")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the logarithm of the length")
    parser.add_argument("--longest", type=int, default=8192, help="tokens, engine.max_model_len")
    parser.add_argument("--limit", type=int, default=8192, help="tokens, trainer.micro_batch_tokens")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="seeds 0, 1, ...")
    parser.add_argument("--min-fill", type=float, default=0.97)
    parser.add_argument("--max-imbalance", type=float, default=1.05)
    args = parser.parse_args()
    print(f"{'seed':>4} {'tokens':>9} {'passes':>6} {'fill':>6} {'best':>6} {'imbalance':>9} {'lockstep':>8} {'ms':>5}")
    missed = 0
    for seed in range(args.steps):
        drawn = np.random.default_rng(seed).lognormal(np.log(args.median), args.sigma, args.samples)
        lengths = np.clip(drawn, 16, args.longest).astype(int).tolist()
        m = measure(lengths, args.ranks, args.limit)
        missed += m.fill < args.min_fill or m.imbalance > args.max_imbalance
        print(
            f"{seed:>4} {sum(lengths):>9,} {m.micro_batches:>6} {m.fill:>6.3f} {m.best_fill:>6.3f} {m.imbalance:>9.4f} "
            f"{m.lockstep:>8.4f} {1000 * m.seconds:>5.1f}"
        )
    targets = f"fill >= {args.min_fill} and imbalance <= {args.max_imbalance}"
    print(f"{args.steps - missed} of {args.steps} steps with {targets}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
