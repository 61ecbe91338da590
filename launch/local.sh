#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts several processes of one run on this machine and exits with their code.
#
#   launch/local.sh [--dry-run] [--gpus-each N] COUNT COMMAND...
#   launch/local.sh 2 python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift
#
# --dry-run      print the commands, start nothing
# --gpus-each N  give each process N GPUs of its own
# Ctrl-C or SIGTERM stops all of them after a checkpoint; the same command goes on.
set -euo pipefail

usage() { sed -n '3,11s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $1; see $0 --help" >&2; exit 2; }

dry_run=false gpus=0
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift ;;
    --gpus-each) gpus=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
    -*) fail "unknown flag $1" ;;
    *) break ;;
  esac
done
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus-each=$gpus must be a number"
count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "COUNT='$count' must be a number of processes"
shift
(($#)) || fail "COMMAND is missing"

port=${GIFT_JAX_PORT:-$((20000 + RANDOM % 20000))}
pids=()
for ((i = 0; i < count; i++)); do
  command=("$@" "--config.hardware.processes.coordinator=127.0.0.1:$port")
  command+=("--config.hardware.processes.count=$count" "--config.hardware.processes.index=$i")
  if ((gpus)); then
    devices=$(seq -s, $((i * gpus)) $((i * gpus + gpus - 1)))
    command=(env "CUDA_VISIBLE_DEVICES=$devices" "${command[@]}")
  fi
  if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
$dry_run && exit 0

trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
code=0
for pid in "${pids[@]}"; do
  status=0
  # A trapped signal ends `wait` early: repeat it until the process is gone.
  while wait "$pid" || status=$?; kill -0 "$pid" 2>/dev/null; do :; done
  ((code)) || code=$status
done
exit "$code"
