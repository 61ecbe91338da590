#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command on a Cloud TPU VM pod slice: creates it, starts, follows and resumes.
# Not yet tried on a slice; the tests check the commands that --dry-run prints.
#
#   launch/tpu_pod.sh [--dry-run] create NAME --zone Z --type v5litepod-16 [--spot]
#   launch/tpu_pod.sh [--dry-run] copy   NAME --zone Z
#   launch/tpu_pod.sh [--dry-run] start  NAME --zone Z COMMAND...
#   launch/tpu_pod.sh [--dry-run] logs   NAME --zone Z
#   launch/tpu_pod.sh [--dry-run] stop   NAME --zone Z
#   launch/tpu_pod.sh [--dry-run] resume NAME --zone Z --type T [--spot] COMMAND...
#   launch/tpu_pod.sh [--dry-run] delete NAME --zone Z
#
# create  asks for the slice     copy   sends this folder to every worker, installs it
# start   runs COMMAND on all workers, in the background     logs  follows worker 0
# stop    SIGTERM: a checkpoint, then exit code 143
# resume  after preemption: delete, create, copy and start again; the run goes on
# The workdir must lie where every worker sees it. Needs gcloud, and a project set in it.
set -euo pipefail

usage() { sed -n '3,20s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $1; see $0 --help" >&2; exit 2; }

dry_run=false spot=false zone='' type=''
version=${GIFT_JAX_TPU_RUNTIME:-tpu-ubuntu2204-base}
if [[ ${1:-} == --dry-run ]]; then dry_run=true; shift; fi
[[ ${1:-} == -h || ${1:-} == --help ]] && { usage; exit 0; }
action=${1:-} name=${2:-}
case $action in
  create | copy | start | logs | stop | resume | delete) ;;
  *) fail "ACTION='$action' must be create, copy, start, logs, stop, resume or delete" ;;
esac
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "NAME='$name' must be of a-z, 0-9 and -"
shift 2
while (($#)); do
  case $1 in
    --zone) zone=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
    --type) type=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
    --spot) spot=true; shift ;;
    -*) fail "unknown flag $1" ;;
    *) break ;;
  esac
done
[[ -n $zone ]] || fail "--zone is missing"
case $action in
  create | resume) [[ -n $type ]] || fail "--type is missing, such as v5litepod-16" ;;
esac
case $action in
  start | resume) (($#)) || fail "COMMAND is missing" ;;
esac

tpu() { run gcloud compute tpus tpu-vm "$@" --zone "$zone"; }
run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

create() {
  local flags=(--accelerator-type "$type" --version "$version")
  if $spot; then flags+=(--spot); fi
  tpu create "$name" "${flags[@]}"
}
copy() {
  local archive=gift_jax.tar.gz
  run git archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$name:gift_jax.tar.gz" --worker=all
  on_all 'mkdir -p gift_jax && tar -xzf gift_jax.tar.gz -C gift_jax && cd gift_jax &&
    python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
}
start() {
  local command
  command=$(printf '%q ' "$@")
  on_all "cd gift_jax && (PATH=\$PWD/.venv/bin:\$PATH nohup setsid $command\
> run.log 2>&1 < /dev/null & echo \$! > run.pid)"
}
on_all() { tpu ssh "$name" --worker=all --command "$1"; }

case $action in
  create) create ;;
  copy) copy ;;
  start) start "$@" ;;
  logs) tpu ssh "$name" --worker=0 --command 'tail -n 50 -F gift_jax/run.log' ;;
  stop) on_all "kill -TERM \$(cat gift_jax/run.pid)" ;;
  resume)
    tpu delete "$name" --quiet || true # what was preempted may be gone already
    create
    copy
    start "$@"
    ;;
  delete) tpu delete "$name" --quiet ;;
esac
