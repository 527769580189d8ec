#!/usr/bin/env bash
#SBATCH --job-name=h3scale
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@180
#
# Trains a recipe on a Slurm cluster, one task a GPU:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train.sh RECIPE [key=value ...]
# The ranks must divide the recipe's rows: data.rows_per_batch = ranks x rows_per_micro_batch x a whole number.
# Options of sbatch override the lines above. What the cluster needs is in slurm/env.sh, when it is there (slurm/env.example.sh).
# USR2 comes 180 s before the time limit: take a larger lead where a step and two saves last longer. slurm/README.md has the rest.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch [options] slurm/train.sh RECIPE [key=value ...]" >&2
  exit 2
fi
python=() srun_options=()
# shellcheck source=/dev/null
[[ ! -f ${SLURM_SUBMIT_DIR:=$PWD}/slurm/env.sh ]] || source "$SLURM_SUBMIT_DIR/slurm/env.sh"
[[ ${#python[@]} -gt 0 ]] || python=("${PYTHON:-python}")

restart=${SLURM_RESTART_COUNT:-0}
H3SCALE_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs)
# Slurm's own address of the node: its name need not resolve everywhere
MASTER_ADDR=$(scontrol show node "${H3SCALE_NODES%% *}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# Below the ports that systems give away; another one after a restart, in case somebody keeps this one
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * restart) % 12000))
H3SCALE_TASKS_PER_NODE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
export MASTER_ADDR MASTER_PORT H3SCALE_NODES H3SCALE_TASKS_PER_NODE

# bash runs a trap between commands and not during one: what may last runs in the background, and `wait` is left at once.
ranks=
signalled=
# shellcheck disable=SC2329
pass_on() {
  signalled=$1
  [[ -z $ranks ]] || scancel --signal="$1" "$SLURM_JOB_ID" 2>/dev/null || true # to the ranks of all nodes, not to this shell
}
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM
code=0
finish() { # the exit code of a job in the background, through any number of signals
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  code=0
  wait "$1" || code=$?
}

logs=${SLURM_JOB_NAME:-h3scale}-$SLURM_JOB_ID
mkdir -p "$logs"
echo "job $SLURM_JOB_ID, start $((restart + 1)): $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST; to watch: tail -F $PWD/$logs/rank-0.log"

srun "${srun_options[@]}" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  "${python[@]}" -m h3scale.launch.preflight "$@" &
finish $!
if [[ $code == 0 && -z $signalled ]]; then
  # Slurm's words for a rank become the ones that torch and DeepSpeed read, inside each task.
  # shellcheck disable=SC2016
  srun "${srun_options[@]}" --kill-on-bad-exit=1 --wait=60 --open-mode=append --output="$logs/rank-%t.log" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$H3SCALE_TASKS_PER_NODE
    exec "$@"' h3scale "${python[@]}" -m h3scale.train "$@" &
  ranks=$!
  finish "$ranks"
  ranks=
  tail -n 3 "$logs/rank-0.log" || true
elif [[ $code == 0 ]]; then
  code=75 # nothing to save yet
fi

state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
if [[ $state != RUNNING ]]; then # cancelled, out of time before the ranks had ended, or a node is lost (Slurm requeues that itself)
  echo "job $SLURM_JOB_ID: Slurm takes it away; unless it starts again by itself, the same command goes on at its newest step" >&2
  exit "$code"
fi
# Launchers lose exit codes; the run's own exit_status.json has the right one.
verdict=$(srun "${srun_options[@]}" --nodes=1 --ntasks=1 "${python[@]}" -m h3scale.launch.after --code "$code" "$@" |
  tail -n 1) || verdict="end $code"
read -r action code <<<"$verdict"
if [[ $action == requeue ]]; then
  scontrol requeue "$SLURM_JOB_ID" && exit "$code"
  echo "job $SLURM_JOB_ID: Slurm does not requeue it (works: sbatch without --no-requeue); submit it again to go on" >&2
fi
exit "$code"
