#!/usr/bin/env bash
# Builds and runs the whole suite: all that this machine allows. Ends with "N passed, N failed, N skipped"; skipped is what wants
# a GPU, a toolkit or a tool that is not here. Output of each part: build/log/.
#   scripts/test.sh [--no_setup]      --no_setup: installs nothing
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} # see compare.sh

passed=0 failed=0 skipped=0
broken=()
log=build/log
mkdir -p $log

count() { # name passed failed skipped seconds
    passed=$((passed + $2)) failed=$((failed + $3)) skipped=$((skipped + $4))
    printf '%-34s %4d passed %4d failed %4d skipped %6d s\n' "$1" "$2" "$3" "$4" "$5"
    if (($3)); then
        broken+=("$1")
        echo "--- the end of $log/$1.txt"
        tail -n 80 "$log/$1.txt" 2> /dev/null || true
        echo "---"
    fi
}

# A part that passes or fails as a whole.
check() { # name command...
    local name=$1 start=$SECONDS
    shift
    if "$@" > "$log/$name.txt" 2>&1; then
        count "$name" 1 0 0 $((SECONDS - start))
    else
        count "$name" 0 1 0 $((SECONDS - start))
    fi
}

# A test program or script. On more than two cores several run side by side, so the longest come first.
at_once=$((($(nproc) + 1) / 2))
running=() # "name pid start", the oldest first
trap 'kill $(jobs -p) 2> /dev/null; exit 130' INT TERM # what runs in the background does not hear Ctrl-C
program() { # name command...
    local name=$1
    shift
    ((${#running[@]} < at_once)) || collect
    timeout --kill-after=10 1500 "$@" > "$log/$name.txt" 2>&1 < /dev/null &
    running+=("$name $! $(date +%s)")
}

# Its own last counts, doctest's or "N passed, N failed, N skipped". One that ends badly without a failed test, or that ran
# none, has failed.
collect() {
    local name pid start status=0 counts p f s
    read -r name pid start <<< "${running[0]}"
    running=("${running[@]:1}")
    wait "$pid" || status=$?
    counts=$(sed -nE -e 's/^\[doctest\] test cases: *[0-9]+ \| *([0-9]+) passed \| *([0-9]+) failed \| *([0-9]+) skipped.*/\1 \2 \3/p' \
        -e 's/^([0-9]+) passed, ([0-9]+) failed, ([0-9]+) skipped$/\1 \2 \3/p' "$log/$name.txt" | tail -n 1)
    read -r p f s <<< "${counts:-0 1 0}"
    ((status == 0 || f > 0)) || f=1
    ((p + f + s > 0)) || f=1
    ((status == 0)) || echo "exit status $status" >> "$log/$name.txt"
    count "$name" "$p" "$f" "$s" $(($(date -r "$log/$name.txt" +%s) - start)) # its last words are its counts
}

[[ ${1:-} == --no_setup ]] || scripts/setup.sh

echo "== build"
make info
found=" $(make -s found) "
have() { [[ $found == *" $1 "* ]]; }

# nvcc takes minutes over what a C++ compiler does in seconds: say so before, and each program as its turn comes.
to_build=$(make --dry-run train_gpt tests 2> /dev/null | grep -c -- ' -o ' || true)
cores=$(nproc)
if have nvcc; then seconds=$((400 / (cores < 6 ? cores : 6))); else seconds=$((90 / (cores < 3 ? cores : 3))); fi
((to_build == 0)) || echo "$to_build programs to build; all of them take about $seconds s on $cores cores$(! have nvcc || echo ", most of it nvcc")"
announce() { # each compiler's line, as it begins
    local line compiles='^[^ ]*(g\+\+|clang|nvcc|c\+\+)[^ ]* .* -o ([^ ]+)'
    while IFS= read -r line; do
        [[ ! $line =~ $compiles ]] || printf '%6d s  compiling %s\n' $SECONDS "${BASH_REMATCH[2]}"
    done
}
build() { make --keep-going --jobs="$cores" train_gpt tests 2>&1 | tee /dev/fd/3; }
check make build 3> >(announce)
no_warnings() { ! grep -h 'warning' $log/make.txt; }
check no_warnings no_warnings

echo "== tests"
# A build for the GPU can leave NCCL and MPI out; then what is tested here is not the whole program.
complete() { # with nvcc: CUDA in it; in CI: NCCL and MPI as well
    ./train_gpt --version
    ! have nvcc || ./train_gpt --version | grep cuda || return 1 # each by itself: -e is off inside an if
    [[ ${CI:-} != true ]] || ! have nvcc || ./train_gpt --version | grep nccl || return 1
    [[ ${CI:-} != true ]] || ./train_gpt --version | grep mpi || return 1
}
check complete_build complete

static_count() { # source [what sed leaves out]: cases in what a test program includes, where it can't be built
    sed -n 's|^#include "\(test_.*\)"|test/\1|p' "$1" | xargs cat | sed "${2:-}" | grep -c '^TEST_CASE'
}
gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
if have nvcc && ((gpus > 1)); then
    program test_ranks_cuda python3 test/test_ranks.py ./train_gpt cuda
else
    count "test_ranks_cuda (not two GPUs)" 0 0 "$(grep '^def test_' test/test_ranks.py | grep -vc plan)" 0
fi
for name in test_cuda_fp32 test_cuda_bf16; do
    if ! have nvcc; then
        count "$name (no CUDA toolkit)" 0 0 "$(static_count test/test_cuda.cu)" 0
    elif ((gpus > 0)); then
        program $name build/$name
    else # built and counted, not run
        cases=$(build/$name --count 2>&1 | grep -oE '[0-9]+$' | tail -n 1 || true)
        if [[ $cases ]]; then count "$name (no GPU)" 0 0 "$cases" 0; else count "$name" 0 1 0 0; fi
    fi
done
if have mpirun; then
    program test_ranks python3 test/test_ranks.py ./train_gpt
else
    count "test_ranks (no mpirun that works)" 0 0 "$(grep -c '^def test_' test/test_ranks.py)" 0
fi
program test_train python3 test/test_train.py ./train_gpt
program test_generate python3 test/test_generate.py ./train_gpt
for name in test_comm test_host test_cpu; do
    program $name build/$name
done
for name in test_fiber_fp32 test_fiber_bf16; do # fiber.h takes bf16 and half from the toolkit's headers
    if have nvcc; then
        program $name build/$name
    else
        count "$name (no CUDA toolkit)" 0 0 "$(static_count test/test_fiber.cpp '/^#ifndef FIBER/,/^#endif/d')" 0
    fi
done
program test_data python3 test/test_data.py
program test_hf python3 test/test_hf.py ./train_gpt
program test_proof python3 test/test_proof.py
program test_measure python3 test/test_measure.py
program soak python3 test/soak.py ./train_gpt
program fuzz test/fuzz.sh "$([[ ${CI:-} == true ]] && echo 60 || echo 5)"
program test_seam python3 test/test_seam.py
check faults python3 test/mutants.py --check
program lint make -s lint
while ((${#running[@]})); do collect; done

echo
((${#broken[@]} == 0)) || echo "failed: ${broken[*]}"
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
