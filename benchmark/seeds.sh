# What the scripts beside this file share (sourced, not run). Environment variables:
#   SEEDS="1 2 3"   GPUS="0"   DATA=data   RUNS=runs/benchmark   PYTHON=python
# Each seed runs on one GPU, as many seeds side by side as GPUS names: GPUS="0 1 2" runs three at a time, GPUS="0 0" two
# on one card. What has a result.json is skipped, what is unfinished goes on: start a script again after any interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SEEDS=${SEEDS:-1 2 3} DATA=${DATA:-data} RUNS=${RUNS:-runs/benchmark}
read -ra gpus <<< "${GPUS:-0}"
failed=0
python() { # a run that fails is named, and the others go on
    command "${PYTHON:-python}" "$@" --data-root "$DATA" --resume --out-dir "$out" || { echo "failed: $out" >&2 && failed=1; }
}

finished() { # finished NAME: sets the run folder, and says whether its result is there
    out=$RUNS/$1
    [ -e "$out/result.json" ]
}

side_by_side() { # side_by_side FUNCTION: FUNCTION SEED for every seed, the GPUs in turn
    local pids=() seed status=0
    for seed in $SEEDS; do
        if ((${#pids[@]} >= ${#gpus[@]})); then # the GPU of the oldest seed is the next one's
            wait "${pids[0]}" || status=1
            pids=("${pids[@]:1}")
        fi
        { export CUDA_VISIBLE_DEVICES=${gpus[0]}; "$1" "$seed"; exit $failed; } &
        pids+=($!)
        gpus=("${gpus[@]:1}" "${gpus[0]}")
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    return $status
}
