#!/bin/bash
# One run on SLURM, from its first step to its last: `sbatch configs/slurm/train.sh CONFIGS AND FLAGS OF pi05 fit`.
# The same command starts the run, goes on with it after a requeue, and goes on with it when it is submitted again.
# Name the run and its size in the environment or here:
#   RUN=runs/mine sbatch --nodes 4 configs/slurm/train.sh -c configs/finetune.yaml --trainer.strategy fsdp2
#SBATCH --job-name=pi05
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --mem=0
# 15 minutes before the time is over every rank gets the signal: the step under way is saved, and the job is requeued.
# A validation that has begun on several ranks is finished first: give more than the longest one takes
#SBATCH --signal=SIGUSR1@900

# as of SLURM 22.05 srun does not take --cpus-per-task from the job
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    pi05 fit "$@" --run "${RUN:-runs/slurm-$SLURM_JOB_ID}" --resume auto \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
