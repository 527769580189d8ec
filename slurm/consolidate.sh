#!/usr/bin/env bash
#SBATCH --job-name=h3scale-consolidate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# Makes a Hugging Face folder of a training checkpoint. It needs no GPU, and little memory whatever the model's size:
#   sbatch [options] slurm/consolidate.sh RUN MODEL [--dtype bfloat16]
# All words are those of `h3scale checkpoint consolidate`. Without Slurm it runs here: bash slurm/consolidate.sh ...
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch [options] slurm/consolidate.sh RUN MODEL [--dtype bfloat16]" >&2
  exit 2
fi
python=() srun_options=()
# shellcheck source=/dev/null
[[ ! -f ${SLURM_SUBMIT_DIR:=$PWD}/slurm/env.sh ]] || source "$SLURM_SUBMIT_DIR/slurm/env.sh"
[[ ${#python[@]} -gt 0 ]] || python=("${PYTHON:-python}")
[[ -z ${SLURM_JOB_ID:-} ]] || python=(srun --ntasks=1 "${srun_options[@]}" "${python[@]}")
exec "${python[@]}" -m h3scale.cli.main checkpoint consolidate "$@"
