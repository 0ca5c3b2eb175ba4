#!/bin/bash
# Several processes on one machine, one for each GPU, or two on CPUs: examples/one_machine.sh [PROCESSES] [OPTIONS...]
# A process that dies ends the others; torchrun starts all again, and they continue from the last checkpoint.
set -eu
processes=${1:-2}
shift || true
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 \
  -m fastres train resnet20 --data digits --out runs/processes --save-every 20 "$@"
