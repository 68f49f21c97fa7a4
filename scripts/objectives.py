#!/usr/bin/env python
"""The quickstart with other objectives and other ways to hold the weights: does it learn to the same reward?

    .venv/bin/python scripts/objectives.py                       # all variants, one seed
    .venv/bin/python scripts/objectives.py --variants lora gspo  # some of them
    .venv/bin/python scripts/objectives.py --figure-only         # draw again what is there

Each run is `pipelinerl train experiment=quickstart` with the overrides of its variant. A run that is there is not done
again. Writes <out>/<variant>-seed<k>/, and <figures>/objectives.png and .md.
"""

import argparse
from pathlib import Path

from variants import finished, train

from pipelinerl.metrics.compare import Panel, compare, table

VARIANTS = {
    "ppo_clip": [],
    "zero_3_two_ranks": ["trainer.zero_stage=3", "trainer.ranks=2"],
    "lora": ["trainer.lora.rank=8", "trainer.lr=2e-3"],
    "gspo": ["algo=gspo"],
    "cispo": ["algo=cispo", "trainer.lr=1.5e-4"],  # it bounds weights, not steps: at 4e-4 it collapses
    "decoupled_ppo": ["algo=decoupled_ppo", "batch.updates=2", "trainer.lr=1e-4"],
}
PANELS = [
    Panel("reward/mean", "Reward", "mean of the step"),
    Panel("policy/entropy", "Entropy", "nats per token"),
    Panel("policy/clip_rate", "Clip rate", "% of tokens", 100),
    Panel("policy/kl_old_new", "KL old/new", "nats per token", log_from=1e-5),
]
LAST = 20  # steps that the table averages over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("outputs/objectives"))
    parser.add_argument("--figures", type=Path, default=Path("docs"))
    parser.add_argument("--figure-only", action="store_true")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. steps=60")
    args = parser.parse_args()
    for seed in [] if args.figure_only else args.seeds:
        for name in args.variants:
            overrides = ["experiment=quickstart", f"seed={seed}", *VARIANTS[name], *args.overrides]
            train(args.out / f"{name}-seed{seed}", overrides)
    runs = finished(args.out, VARIANTS)
    compare(runs, PANELS, args.figures / "objectives.png")
    (args.figures / "objectives.md").write_text(table(runs, PANELS, LAST))
    print((args.figures / "objectives.md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
