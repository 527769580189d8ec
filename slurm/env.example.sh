#!/usr/bin/env bash
# Copy to slurm/env.sh and keep what your cluster needs; slurm/train.sh sources it on the first node, srun passes it on.
# module load cuda
# source /path/to/h3scale/.venv/bin/activate
# export NCCL_SOCKET_IFNAME=eth0      # the network that nodes reach each other over
