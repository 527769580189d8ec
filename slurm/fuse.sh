#!/usr/bin/env bash
#SBATCH --job-name=h3scale-fuse
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# Makes one mixture of experts of a base and its aligned models. To start the router it needs memory for all of the fused model:
#   sbatch [options] slurm/fuse.sh RECIPE [key=value ...]
# All words are those of `h3scale fuse`. Without Slurm it runs here: bash slurm/fuse.sh ...
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch [options] slurm/fuse.sh RECIPE [key=value ...]" >&2
  exit 2
fi
python=() srun_options=()
# shellcheck source=/dev/null
[[ ! -f ${SLURM_SUBMIT_DIR:=$PWD}/slurm/env.sh ]] || source "$SLURM_SUBMIT_DIR/slurm/env.sh"
[[ ${#python[@]} -gt 0 ]] || python=("${PYTHON:-python}")
[[ -z ${SLURM_JOB_ID:-} ]] || python=(srun --ntasks=1 "${srun_options[@]}" "${python[@]}")
exec "${python[@]}" -m h3scale.cli.main fuse "$@"
