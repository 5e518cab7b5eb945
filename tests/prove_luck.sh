#!/usr/bin/env bash
# Run the tests under conditions that must not decide about them: instruction sets, threads, seeds, other work.
#
#   tests/prove_luck.sh [PYTEST ARGUMENTS]      e.g. tests/test_sweep.py
#
# PYTHON: the interpreter. One line a condition at the end; exit code 1 if any failed.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE OPENBLAS_NUM_THREADS=1
declare -a hogs=() told=()
failed=0

stop_hogs() {
    if ((${#hogs[@]})); then kill "${hogs[@]}"; fi
    hogs=()
}
trap stop_hogs EXIT

# condition CAPABILITY THREADS SEED HOGS [PYTEST ARGUMENTS]; CAPABILITY is PyTorch's, or "unset"
condition() {
    local capability=$1 threads=$2 seed=$3 count=$4 result=passed
    shift 4
    local -a variables=(OMP_NUM_THREADS="$threads" SINGER_TEST_SEED="$seed")
    if [[ $capability != unset ]]; then variables+=(ATEN_CPU_CAPABILITY="$capability"); fi
    for ((n = 0; n < count; n++)); do
        while :; do :; done &
        hogs+=($!)
    done
    env -u ATEN_CPU_CAPABILITY "${variables[@]}" nice -n 5 "$python" -m pytest -n 2 --dist worksteal --timeout 3600 "$@"
    (($? == 0)) || { result=FAILED failed=1; }
    stop_hogs
    told+=("$result: ATEN_CPU_CAPABILITY $capability, threads $threads, seed $seed, hogs $count")
}

condition default 1 0 0 "$@"
condition avx2 4 1 0 "$@"
condition unset 2 2 2 "$@"
printf '%s\n' "${told[@]}"
exit $failed
