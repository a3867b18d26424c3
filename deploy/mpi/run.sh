#!/usr/bin/env bash
# A cluster by hand: the coordinator here, worker ranks on the hosts of a hostfile.
# usage: HEDDLE_CLUSTER_TOKEN=… deploy/mpi/run.sh MODEL HOSTFILE RANKS [TP]
# The model directory and this program lie at the same path on every host.
set -euo pipefail
model=$1 hostfile=$2 ranks=$3 tp=${4:-$3}
: "${HEDDLE_CLUSTER_TOKEN:?set it to a secret, the same for all}"
export HEDDLE_CLUSTER_TOKEN
heddle=${HEDDLE:-heddle}
here=$(hostname -f)

"$heddle" coordinator "$model" --host 0.0.0.0 --port 8000 --worker-address 0.0.0.0:8001 \
  --tensor-parallel-size "$tp" --data-parallel-size $((ranks / tp)) &
coordinator=$!
trap 'kill -TERM $coordinator 2>/dev/null; wait' EXIT

# One mpirun for all ranks: losing one ends all of them, and the loop starts them again. Use one
# mpirun a replica (--replica N) to keep replicas apart.
while kill -0 "$coordinator" 2>/dev/null; do
  mpirun -np "$ranks" --hostfile "$hostfile" --bind-to none --mca mpi_yield_when_idle 1 \
    -x HEDDLE_CLUSTER_TOKEN \
    "$heddle" worker "$model" --coordinator "$here:8001" --tensor-parallel-size "$tp" && break
  sleep 1
done
wait "$coordinator"
