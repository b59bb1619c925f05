#!/bin/bash
# A run on several nodes under SLURM:   sbatch --nodes 4 deploy/slurm.sh run --config run.yaml
# The words after the script are those of atropos-train. train.output_dir has to be on a file system that all nodes share.

#SBATCH --job-name=atropos-train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=USR1@300
#SBATCH --requeue

# One launcher a node, which starts a process for each GPU. Five minutes before the end of the job's time SLURM
# signals the launchers; they pass it on, and a checkpoint is written, from which the same command goes on. SLURM starts
# the job again by itself after a preemption or the failure of a node, but not at the end of its time.
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Since 22.05 srun does not take over the job's CPUs a task: a launcher and its processes would share one.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head_node:${PORT:-29500}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1 --shutdown-timeout 240 \
    -m trainer.cli "$@"
