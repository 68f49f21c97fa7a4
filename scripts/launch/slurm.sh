#!/usr/bin/env bash
# A run on the nodes of a SLURM job: start Ray on them, run `pipelinerl train cluster=ray ...` on the first, clean up.
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/launch/slurm.sh experiment=math_7b_8gpu task.path=FILE run_dir=/shared/run
#   scripts/launch/slurm.sh --dry-run [overrides]     in an allocation: print the commands instead
#
# Overrides are those of `pipelinerl train`. Checkout, model, data and run_dir must be on storage that all nodes share.
# SIGTERM, which this script gets 120 s before the time is up, is passed on: the run saves a checkpoint and exits with
# 143. A job that is submitted again with the same run_dir goes on from the newest checkpoint.
#SBATCH --job-name=pipelinerl
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail

fail() { echo "slurm.sh: $1" >&2; exit 3; }

dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi

# sbatch runs a copy of this file: the checkout is where sbatch was called, unless PIPELINERL_HOME says otherwise.
bin="${PIPELINERL_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/.venv/bin"
[ -x "$bin/pipelinerl" ] || fail "no $bin/pipelinerl; call sbatch in the checkout after scripts/install.sh, or set PIPELINERL_HOME"
[ -n "${SLURM_JOB_NODELIST:-}" ] || fail "no SLURM job here; submit it: sbatch --nodes=2 --gpus-per-node=8 scripts/launch/slurm.sh ..."

job="${SLURM_JOB_ID:-0}"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# This script runs on the first node. Its address, not its name: names mean different things on different nodes.
ip="$("$bin/python" -c 'import ray; print(ray.util.get_node_ip_address())' | tail -n 1)"
address="$ip:$((61000 + job % 4000))"  # above the ports that Linux hands out
# Only who holds this token can use the cluster. It is in the home directory, which nodes share, and gone with the job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${PIPELINERL_TOKEN_DIR:-$HOME/.pipelinerl}/ray-token-$job"

on_node() { step=(srun --nodes=1 --ntasks=1 --overlap --cpu-bind=none --export=ALL -w "$1" "$bin/ray" start --block --disable-usage-stats); }
head_of_ray() {
    on_node "${nodes[0]}"
    # A folder of its own: /tmp/ray may be another user's.
    command=("${step[@]}" --head --include-dashboard=false --node-ip-address="$ip" --port="${address##*:}" --temp-dir="/tmp/ray-$job")
}
worker_of_ray() { on_node "$1"; command=("${step[@]}" --address="$address"); }
driver() { command=("$bin/pipelinerl" train cluster=ray cluster.address="$address" "$@"); }

if [ -n "$dry_run" ]; then
    show() { printf '%q ' "${command[@]}"; echo; }
    head_of_ray; show
    for node in "${nodes[@]:1}"; do worker_of_ray "$node"; show; done
    driver "$@"; show
    exit 0
fi

steps=() run='' stopped=''
tear_down() {
    trap '' TERM
    for pid in $run "${steps[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    wait || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
pass_on() {
    stopped=1
    [ -z "$run" ] || kill -TERM "$run" 2>/dev/null || true
}
trap tear_down EXIT
trap pass_on TERM

mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
(umask 077; "$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

head_of_ray; "${command[@]}" & steps+=($!)
for node in "${nodes[@]:1}"; do worker_of_ray "$node"; "${command[@]}" & steps+=($!); done
# The driver itself waits for room on all nodes (cluster.placement_timeout_s); here only for the head.
for attempt in $(seq 60); do
    "$bin/ray" status --address="$address" > /dev/null 2>&1 && break
    [ -z "$stopped" ] || exit 143
    kill -0 "${steps[0]}" 2>/dev/null || fail "Ray did not start on ${nodes[0]}"
    [ "$attempt" -lt 60 ] || fail "Ray on ${nodes[0]} did not answer at $address"
    sleep 2
done

[ -z "$stopped" ] || exit 143
driver "$@"; "${command[@]}" & run=$!
while true; do  # a signal ends the wait, not the run, which then saves
    code=0
    wait "$run" || code=$?
    kill -0 "$run" 2>/dev/null || break
done
run=''
exit "$code"
