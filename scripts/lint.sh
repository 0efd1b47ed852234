#!/usr/bin/env bash
# The style of every source, one check for each tool and source. Ends with "N passed, N failed, N skipped": skipped is what needs
# a tool that is not here (scripts/setup.sh --lint installs them).
#   scripts/lint.sh [COMPILER FLAG...]      usually by way of `make lint`, which knows the flags
set -euo pipefail
cd "$(dirname "$0")/.."

flags=(-std=c++17 -Wall -Wextra -Wold-style-cast -Wno-unknown-pragmas)
for flag in "$@"; do
    case $flag in
        -I.) flags+=("$flag") ;;
        -I*) flags+=(-isystem "${flag#-I}") ;; # not ours
        *) flags+=("$flag") ;;
    esac
done
cuda=""
for directory in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
    [[ $cuda || ! -e $directory/include/cuda_bf16.h ]] || cuda=$directory/include
done

passed=0 failed=0 skipped=0
names=() pids=()
log=build/log/lint
mkdir -p $log
trap 'kill $(jobs -p) 2> /dev/null; exit 130' INT TERM

skip() { # name why
    echo "skip $1: $2"
    skipped=$((skipped + 1))
}
start() { # name command...: in the background, as many at once as there are cores
    local name=$1
    shift
    ((${#pids[@]} < $(nproc))) || finish
    "$@" > "$log/$name.txt" 2>&1 < /dev/null &
    names+=("$name") pids+=($!)
}
finish() { # the oldest
    local name=${names[0]}
    if wait "${pids[0]}"; then
        echo "ok $name"
        passed=$((passed + 1))
    else
        echo "FAIL $name:"
        grep -v 'warnings\? generated\|^Suppressed\|^Use -header' "$log/$name.txt" || true
        failed=$((failed + 1))
    fi
    names=("${names[@]:1}") pids=("${pids[@]:1}")
}
version_14() { # tool: the command, where there is one of version 14; other versions find other things
    local command
    for command in "$1-14" "$1"; do
        if [[ $($command --version 2> /dev/null) == *"version 14."* ]]; then
            echo "$command"
            return
        fi
    done
}

tidy=$(version_14 clang-tidy)
for source in test/test_fiber.cpp train_gpt.cu; do # the longer first
    name=tidy_$(basename "$source")
    case $source in
        *.cu) extra=(-x c++) ;;                      # the CPU's program, and with it every header that is not of a GPU alone
        *fiber*) extra=(-DFIBER -isystem "$cuda") ;; # the kernels and their tests
    esac
    if [[ ! $tidy ]]; then
        skip "$name" "no clang-tidy 14"
    elif [[ $source == *fiber* && ! $cuda ]]; then
        skip "$name" "no CUDA toolkit: fiber.h takes bf16 and half from its headers"
    else
        start "$name" "$tidy" --quiet "$source" -- "${extra[@]}" "${flags[@]}"
    fi
done

format=$(version_14 clang-format)
if [[ $format ]]; then
    shopt -s nullglob
    start format "$format" --dry-run -Werror {,kernels/,test/,dev/}*.{h,cuh,cu,cpp}
else
    skip format "no clang-format 14"
fi

if command -v shellcheck > /dev/null; then
    start shellcheck shellcheck .ci/run scripts/*.sh scripts/train.slurm
else
    skip shellcheck "no shellcheck"
fi

while ((${#pids[@]})); do finish; done
echo "$passed passed, $failed failed, $skipped skipped"
((failed == 0))
