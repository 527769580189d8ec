#!/usr/bin/env bash
#SBATCH --job-name=h3scale-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# Scores models on held-out records, on one GPU where there is one:
#   sbatch [options] slurm/evaluate.sh MODEL ... --records FILE.jsonl --out FOLDER
# All words are those of `h3scale evaluate`. Without Slurm it runs here: bash slurm/evaluate.sh ...
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch [options] slurm/evaluate.sh MODEL ... --records FILE.jsonl --out FOLDER" >&2
  exit 2
fi
python=() srun_options=()
# shellcheck source=/dev/null
[[ ! -f ${SLURM_SUBMIT_DIR:=$PWD}/slurm/env.sh ]] || source "$SLURM_SUBMIT_DIR/slurm/env.sh"
[[ ${#python[@]} -gt 0 ]] || python=("${PYTHON:-python}")
[[ -z ${SLURM_JOB_ID:-} ]] || python=(srun --ntasks=1 "${srun_options[@]}" "${python[@]}")
exec "${python[@]}" -m h3scale.cli.main evaluate "$@"
