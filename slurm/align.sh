#!/usr/bin/env bash
#SBATCH --job-name=h3scale
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR2@180
#
# Tunes a base on the records of one alignment, as `h3scale align` does, one task a GPU:
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/align.sh RECIPE [alignment=NAME] [key=value ...]
# It is slurm/train.sh: where neither recipe nor words say which alignment, all records are trained on.
set -euo pipefail
# Slurm runs a copy of this script; the job knows where the script was
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
exec bash "$(dirname "$script")/train.sh" "$@"
