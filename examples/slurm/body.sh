#!/bin/bash
# What every machine of the job runs, once: the data to its own disk, then torchrun. Without Slurm it runs as well:
#   CONFIG=... TRAIN=... TEST=... PYTHON=python PROCESSES=2 bash examples/slurm/body.sh [--section.key value ...]
set -euo pipefail

processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
local=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/seresnet-${SLURM_JOB_ID:-$$}-${SLURM_NODEID:-0}

trap 'rm -rf "$local"' EXIT
mkdir -p "$local"
for beton in "$TRAIN" "$TEST"; do
    cp "$beton" "$beton.json" "$local/"
done

if [ "${SLURM_NNODES:-1}" = 1 ]; then
    meet=(--standalone)
else
    meet=(--nnodes "$SLURM_NNODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER:$PORT")
fi
# Slurm may signal this shell alone (its cgroup tracker spares what others have started), so it hands the signal on, and waits until
# the training has saved. A signal that comes by both ways is one request to the training.
$PYTHON -m torch.distributed.run "${meet[@]}" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-2}" \
    ffcv_train.py --config-file "$CONFIG" --beton.train "$local/$(basename "$TRAIN")" --beton.test "$local/$(basename "$TEST")" \
    --run.resume auto "$@" &
launcher=$!
trap 'kill -TERM $launcher 2>/dev/null || :' TERM INT    # INT a shell's background job ignores
while :; do
    status=0
    wait $launcher || status=$?
    kill -0 $launcher 2>/dev/null || break    # a trap has ended the waiting, not the training
done
exit $status
