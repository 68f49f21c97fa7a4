#!/usr/bin/env python
"""What the four parity fixes are worth in training: the same task, seeds and steps with and without them.

    .venv/bin/python scripts/parity_ablation.py                       # all variants, three seeds, PPO-clip
    .venv/bin/python scripts/parity_ablation.py --algo gspo           # the same with GSPO
    .venv/bin/python scripts/parity_ablation.py --figure-only         # draw again what is there

Each run is `pipelinerl train experiment=parity_ablation` with the overrides of its variant. A run that is there is not
done again. Writes <out>/<algo>/<variant>-seed<k>/, and <figures>/parity_<algo>.png, parity_<algo>_single.png and .md.
"""

import argparse
from pathlib import Path

from variants import finished, train

from pipelinerl.metrics.compare import Panel, compare, table

RAW = ["engine.logprobs_mode=raw_logprobs"]
CACHING = ["engine.prefix_caching=true", "engine.block_size=32"]
ABORT = ["engine.update_pause=abort", "engine.kv_policy=recompute"]  # what vLLM's pause does unless told otherwise
BF16_HEAD = ["model.head_dtype=bfloat16"]

MAIN = {
    "reference": ["model.dtype=float32"],
    "fixed_v1": [],
    "initial_v1": [*RAW, *CACHING, *ABORT, *BF16_HEAD],
}
SINGLE = {
    "without_1_processed_logprobs": RAW,
    "without_2_runtime_defaults": CACHING,
    "without_3_in_flight_update": ABORT,
    "without_4_fp32_head": BF16_HEAD,
}
VARIANTS = MAIN | SINGLE
PANELS = [
    Panel("policy/clip_rate", "Clip rate", "% of tokens", 100),
    Panel("policy/kl_old_new", "KL old/new", "nats per token", log_from=1e-5),
    Panel("policy/entropy", "Entropy", "nats per token"),
    Panel("reward/mean", "Reward", "mean of the step"),
]
LAST = 20  # steps that the table averages over


def main() -> int:
    args = _parse()
    steps = [f"steps={args.steps}"] if args.steps else []
    for seed in range(args.seeds):
        for name in args.variants:
            if args.figure_only or (name in SINGLE and seed >= args.single_seeds):
                continue
            overrides = ["experiment=parity_ablation", f"algo={args.algo}", f"seed={seed}", *VARIANTS[name]]
            train(args.out / args.algo / f"{name}-seed{seed}", [*overrides, *steps, *args.overrides])
    _draw(args.out, args.figures, args.algo)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="ppo_clip", choices=["ppo_clip", "gspo"])
    parser.add_argument("--seeds", type=int, default=3, help="of the three main variants")
    parser.add_argument("--single-seeds", type=int, default=1, help="of the runs that leave out one fix")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; the experiment's unless given")
    parser.add_argument("--out", type=Path, default=Path("outputs/parity_ablation"))
    parser.add_argument("--figures", type=Path, default=Path("docs"))
    parser.add_argument("--figure-only", action="store_true")
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. trainer.lr=3e-4")
    return parser.parse_args()


def _draw(out: Path, figures: Path, algo: str) -> None:
    main_runs, single = finished(out / algo, MAIN), finished(out / algo, SINGLE)
    if main_runs:
        compare(main_runs, PANELS, figures / f"parity_{algo}.png")
    if single:
        base = {name: runs for name, runs in main_runs.items() if name == "fixed v1"}
        compare(base | single, PANELS, figures / f"parity_{algo}_single.png")
    (figures / f"parity_{algo}.md").write_text(table(main_runs | single, PANELS, LAST))
    print((figures / f"parity_{algo}.md").read_text())


if __name__ == "__main__":
    raise SystemExit(main())
