#!/usr/bin/env bash
# The accuracy study on one GPU, in pieces: a call ends within SECONDS_A_PIECE, and the next one goes on.
#
#   benchmarks/gpu/pack.sh                      with a network: wheels of what the GPU machine lacks
#   benchmarks/gpu/run.sh PARQUET [OVERRIDE..]  on the GPU machine, again until it says that all runs have ended
#
# PARQUET is the folder of CIFAR-10's parquet files. Overrides go to adadim-train, such as trainer.max_epochs=20.
# JOBS runs share the GPU at a time (1); more of them keep it busier, as each waits for its CPU thread now and then.
# WORK keeps arrays, runs and checkpoints from piece to piece; figures are in WORK/runs/gpu.json, copied to OUT if set.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
parquet=$(realpath "$1")
shift
work=${WORK:-/tmp/adadim-gpu}
piece=${SECONDS_A_PIECE:-500}
mkdir -p "$work"

if [ -d benchmarks/gpu/wheels ] && [ ! -d "$work/site" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" benchmarks/gpu/wheels/*.whl
fi
export PYTHONPATH=$PWD/src:$work/site${PYTHONPATH:+:$PYTHONPATH}
python3 benchmarks/gpu/prepare.py "$parquet" "$work/cifar10"

# SIGTERM lets a run write its checkpoint, from which the next piece goes on to the bit.
code=0
timeout --signal=TERM --kill-after=30 $((piece - SECONDS > 1 ? piece - SECONDS : 1)) \
    python3 benchmarks/accuracy/study.py gpu --jobs "${JOBS:-1}" --folder "$work/runs" places.cifar10="$work/cifar10" "$@" ||
    code=$?
if [ -n "${OUT:-}" ] && [ -f "$work/runs/gpu.json" ]; then cp "$work/runs/gpu.json" "$OUT/"; fi
case $code in
    0) echo "all runs have ended: $work/runs/gpu.json" ;;
    124 | 143) echo "the piece is over; the same command goes on" ;;
    *) exit "$code" ;;
esac
