#!/usr/bin/env bash
# Copy to slurm/env.sh and keep what your cluster needs. The scripts source it where they run; srun passes the environment on to all nodes.

# Modules and Python of the ranks, the same on all nodes (slurm/train.sh checks it before it starts them)
# module load cuda/13.0
# source /path/to/h3scale/.venv/bin/activate

# sbatch reads these itself, so that slurm/pipeline.sh and `h3scale launch --submit` need no options; export them in your shell for
# a plain sbatch
# export SBATCH_ACCOUNT=my-account SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=24:00:00

# A container by enroot and pyxis: options of every srun
# srun_options=(--container-image=/path/to/h3scale.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

# A container by apptainer: the command that is Python
# python=(apptainer exec --nv --bind "$PWD" /path/to/h3scale.sif python)

# The network that nodes reach each other over, and its adapters for NCCL
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# export NCCL_IB_HCA=mlx5
# A collective that hangs leaves what each rank was doing in files
# export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_BUFFER_SIZE=2000

# Sizes of the jobs that slurm/pipeline.sh submits
# align_options=(--nodes=1 --ntasks-per-node=8 --gpus-per-node=8)
# train_options=(--nodes=4 --ntasks-per-node=8 --gpus-per-node=8)
# cpu_options=(--nodes=1 --ntasks=1 --cpus-per-task=16 --mem=0)
# gpu_options=(--nodes=1 --ntasks=1 --gpus-per-node=1)
