#!/usr/bin/env bash
#SBATCH --job-name=h3scale
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# Trains a recipe on a Slurm cluster, one task a GPU:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train.sh RECIPE [key=value ...]
# The ranks must divide the recipe's rows: data.rows_per_batch = ranks x rows_per_micro_batch x a whole number.
# Options of sbatch override the lines above. slurm/env.sh, when it is there, prepares the shell on the first node, and srun passes it on
# (modules, environment, network settings; see slurm/env.example.sh).
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch [options] slurm/train.sh RECIPE [key=value ...]" >&2
  exit 2
fi
here=${SLURM_SUBMIT_DIR:-$PWD}
if [[ -f $here/slurm/env.sh ]]; then
  # shellcheck source=/dev/null
  source "$here/slurm/env.sh"
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Slurm's own address of the node: its name need not resolve everywhere
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Slurm's words for a rank become the ones that torch and DeepSpeed read, inside each task.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --wait=60 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
  exec "${PYTHON:-python}" -m h3scale.train "$@"' h3scale "$@"
