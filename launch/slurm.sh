#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Submits a run to Slurm: one process for each task, requeued when it is preempted.
# Not yet tried on a cluster; the tests check the job script that --dry-run prints.
#
#   launch/slurm.sh [--dry-run] --nodes N [--tasks-per-node M] [--gpus-per-task G]
#       [--time HH:MM:SS] [--partition P] COMMAND...
#   launch/slurm.sh --nodes 4 python -m gift_jax.train --config configs/sd15_object.py --workdir runs/gift
#
# --dry-run  print the job script and the command that submits it, submit nothing
# The workdir must lie where every node sees it. SIGTERM comes two minutes before the
# end: the run saves a checkpoint, exits with 143, and the job is queued again.
set -euo pipefail

usage() { sed -n '3,13s/^# \{0,1\}//p' "$0"; }
fail() { echo "error: $1; see $0 --help" >&2; exit 2; }

dry_run=false nodes='' tasks=1 gpus=1 limit=24:00:00 partition=''
while (($#)); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true; shift; continue ;;
    --nodes | --tasks-per-node | --gpus-per-task | --time | --partition)
      (($# > 1)) || fail "$1 needs a value" ;;
    -*) fail "unknown flag $1" ;;
    *) break ;;
  esac
  case $1 in
    --nodes) nodes=$2 ;;
    --tasks-per-node) tasks=$2 ;;
    --gpus-per-task) gpus=$2 ;;
    --time) limit=$2 ;;
    --partition) partition=$2 ;;
  esac
  shift 2
done
for pair in "nodes=$nodes" "tasks-per-node=$tasks" "gpus-per-task=$gpus"; do
  [[ ${pair#*=} =~ ^[1-9][0-9]*$ ]] || fail "--$pair must be a number above 0"
done
[[ $limit =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){1,2}$ ]] || fail "--time=$limit must be like 24:00:00"
(($#)) || fail "COMMAND is missing"

script=$(
  cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=gift_jax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --gpus-per-task=$gpus
#SBATCH --time=$limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
${partition:+#SBATCH --partition=$partition}

code=0
srun --kill-on-bad-exit=0 $(printf '%q ' "$@")|| code=\$?
if [ "\$code" = 143 ]; then  # stopped with a checkpoint before it was done
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
EOF
)
if $dry_run; then
  printf '%s\n\n' "$script"
  echo "sbatch < the script above"
else
  sbatch <<<"$script"
fi
