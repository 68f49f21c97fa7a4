"""Peak memory and time of the trainer's logprobs (trainer/logprobs.py) against autograd over whole logits.

    python scripts/bench/logprobs.py

Both compute logprob and entropy of the selected tokens and the gradients of hidden states and head weight, with the
head multiplied in `--head-dtype`. `naive` keeps [tokens, vocabulary] logits in fp32: log_softmax, gather, entropy
without gradient, autograd. Each run is a process of its own, in turns, so that a peak is its own and noise of the
machine hits both; the time is the best of the repeats. Memory is the largest resident size above that of the process
with its inputs, so it includes the gradients, which both must return. On a machine with other work, one thread and its
CPU seconds say more than seconds do: threads that wait for each other are slowed down by more than their share.

Exit code 1 when time, memory or differences miss the targets given as options.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor

from pipelinerl.trainer.logprobs import Projection, token_logprobs

TEMPERATURE = 0.8
GIB = 2**30


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies [tokens] from whole logits."""
    logits = (hidden.to(dtype) @ weight.to(dtype).T).float() / TEMPERATURE
    log_p = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropies = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropies


def measure(args: argparse.Namespace) -> None:
    """One run in this process. Prints seconds and bytes as JSON and leaves the outcome in `--out`."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype, head_dtype = getattr(torch, args.dtype), getattr(torch, args.head_dtype)
    hidden = torch.randn(args.tokens, args.hidden).to(dtype).requires_grad_()
    weight = torch.randn(args.vocabulary, args.hidden).mul_(2 * args.hidden**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.tokens,))
    per_token = torch.randn(args.tokens)  # what a policy gradient multiplies each token's logprob with
    (torch.randn(512, 512) @ torch.randn(512, 512)).sum()  # threads and libraries are up
    before, start, cpu = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    if args.only == "naive":
        logprobs, entropies = naive(hidden, weight, targets, head_dtype)
    else:
        projection = Projection(TEMPERATURE, head_dtype, args.chunk)
        logprobs, entropies = token_logprobs(hidden, weight, None, targets, projection)
    forward_s = time.perf_counter() - start
    (logprobs * per_token).sum().backward()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    torch.save([t.detach() for t in (logprobs, entropies, hidden.grad, weight.grad)], args.out)
    print(json.dumps({"forward_s": forward_s, "seconds": seconds, "cpu_s": cpu_s, "bytes": peak}))


def run(args: argparse.Namespace, which: str, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", which, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{which}: exit code {done.returncode}\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def differences(ours: Path, plain: Path) -> tuple[float, float]:
    """Largest absolute difference of the values, and of the gradients."""
    pairs = zip(torch.load(ours), torch.load(plain), strict=True)
    found = [float((a.float() - b.float()).abs().max()) for a, b in pairs]
    return max(found[:2]), max(found[2:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=2048, help="trainer.logprob_chunk")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="hidden states and weight")
    parser.add_argument("--head-dtype", choices=["float32", "bfloat16"], default="float32", help="of the product")
    parser.add_argument("--threads", type=int, default=1, help="as many as a trainer rank has on a CPU, by default")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-time", type=float, default=1.15, help="times the naive one")
    parser.add_argument("--max-memory", type=float, default=0.25, help="times the naive one")
    parser.add_argument("--max-difference", type=float, default=1e-4, help="in value and gradient, fp32")
    parser.add_argument("--only", choices=["naive", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.only:
        measure(args)
        return 0
    runs: dict[str, list[dict[str, float]]] = {"naive": [], "chunked": []}
    with tempfile.TemporaryDirectory() as folder:
        outs = {which: Path(folder, which) for which in runs}
        for _ in range(args.repeats):
            for which, results in runs.items():
                results.append(run(args, which, outs[which]))
        value, gradient = differences(outs["chunked"], outs["naive"])
    best = {which: {key: min(r[key] for r in results) for key in results[0]} for which, results in runs.items()}
    ratio = {key: best["chunked"][key] / best["naive"][key] for key in best["naive"]}
    print(
        f"V={args.vocabulary}, H={args.hidden}, {args.tokens} tokens, weight {args.dtype}, head {args.head_dtype}, "
        f"chunk {args.chunk}, {args.threads} thread(s), best of {args.repeats}\n"
    )
    print("| | forward, s | forward and backward, s | CPU, s | peak above inputs, GiB |\n|---|---|---|---|---|")
    for which, row in best.items():
        peak = row["bytes"] / GIB
        print(f"| {which} | {row['forward_s']:.1f} | {row['seconds']:.1f} | {row['cpu_s']:.1f} | {peak:.2f} |")
    print("| ratio |", " | ".join(f"{ratio[key]:.2f}" for key in ("forward_s", "seconds", "cpu_s", "bytes")), "|\n")
    print(f"Largest difference: {value:.1e} in value, {gradient:.1e} in gradient.")
    exact = args.dtype == args.head_dtype == "float32"
    missed = ratio["seconds"] > args.max_time or ratio["bytes"] > args.max_memory
    return int(missed or (exact and max(value, gradient) > args.max_difference))


if __name__ == "__main__":
    sys.exit(main())
