#!/usr/bin/env bash
# Submits the whole way: align (one job an alignment) -> fuse -> train -> consolidate -> evaluate, each when what it needs has ended well.
#   slurm/pipeline.sh RECIPES HELDOUT.jsonl OUT [align.key=value ...] [fuse.key=value ...] [train.key=value ...]
# RECIPES is a folder with fuse.yaml, train.yaml and align_NAME.yaml (or align.yaml) for each alignment; everything is written under OUT.
# Sizes of the jobs: align_options, train_options, cpu_options and gpu_options in slurm/env.sh; without them one node, and the recipe's ranks.
# The same command again submits what is not there yet.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
python=() align_options=() train_options=() cpu_options=() gpu_options=()
# shellcheck source=/dev/null
[[ ! -f slurm/env.sh ]] || source slurm/env.sh
[[ ${#python[@]} -gt 0 ]] || python=("${PYTHON:-python}")

plan=$("${python[@]}" -m h3scale.launch.pipeline "$@")
declare -A numbers # of jobs by name
while IFS=$'\t' read -ra fields; do
  [[ ${#fields[@]} -gt 0 ]] || continue
  name=${fields[0]} after=${fields[1]} script=${fields[2]} ranks=${fields[3]}
  options=(--parsable --job-name="h3-$name")
  case $script in
    align.sh) options+=(--nodes=1 --ntasks-per-node="$ranks" "${align_options[@]}") ;;
    train.sh) options+=(--nodes=1 --ntasks-per-node="$ranks" "${train_options[@]}") ;;
    evaluate.sh) options+=("${gpu_options[@]}") ;;
    *) options+=("${cpu_options[@]}") ;;
  esac
  waits=
  if [[ $after != - ]]; then
    for other in ${after//,/ }; do waits+=:${numbers[$other]}; done
    options+=(--dependency="afterok$waits" --kill-on-invalid-dep=yes)
  fi
  numbers[$name]=$(sbatch "${options[@]}" "$here/$script" "${fields[@]:4}")
  printf '%-10s %-22s%s\n' "${numbers[$name]}" "$name" "${waits:+ after ${waits#:}}"
done <<<"$plan"
[[ -n $plan ]] || echo "everything is there already"
