#!/bin/bash
# ResNet-50 on several nodes under Slurm: sbatch examples/slurm.sh FOLDER
# One torchrun a node starts a process for each GPU. Slurm sends SIGTERM some time before the limit: the run saves, ends with
# code 75, and the job is queued again; the same command continues it. Running this needs a cluster; it was not run on one.
#SBATCH --job-name=fastres
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
data=${1:?the folder with train/ and val/}
out=${2:-runs/resnet50-slurm}
# A store for each start: in a shared one, processes after a restart find the addresses of those before it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m fastres train resnet50 --data "$data" --out "$out" --recipe torchvision-v1 \
  --dtype bf16 --workers 8 --save-every 500 --keep 3 &
srun_pid=$!

stopped=
# The shell gets the signal; srun passes it to every torchrun, and torchrun to its processes.
trap 'stopped=1; kill -TERM $srun_pid' TERM
wait "$srun_pid"
code=$?
if [ -n "$stopped" ]; then
  wait "$srun_pid"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
