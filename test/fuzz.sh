#!/usr/bin/env bash
# Fuzzes the readers of files (test/fuzz.cpp), as many side by side as there are cores:
#   test/fuzz.sh [SECONDS for each [shard|tokenizer|hellaswag|checkpoint]]
# Seeds, what was found interesting on the way, and inputs that broke something: build/fuzz. Ends with
# "N passed, N failed, N skipped"; skipped where there is no libFuzzer.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-10}
kinds=("${2:-shard}")
(($# > 1)) || kinds=(shard tokenizer hellaswag checkpoint)
dir=build/fuzz
mkdir -p $dir

fuzzer=
for compiler in clang++ clang++-{21,20,19,18,17,16,15,14}; do
    printf 'extern "C" int LLVMFuzzerTestOneInput(const char *, unsigned long) { return 0; }' > $dir/probe.cpp
    if "$compiler" -fsanitize=fuzzer,address,undefined $dir/probe.cpp -o $dir/probe 2> /dev/null; then
        fuzzer=$compiler
        break
    fi
done
if [[ ! $fuzzer ]]; then
    echo "no clang++ with libFuzzer (Debian: clang, libclang-rt-14-dev)"
    echo "0 passed, 0 failed, ${#kinds[@]} skipped"
    exit
fi

"$fuzzer" -x c++ -std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -Wall -Wextra \
    -Wno-unknown-pragmas -I. test/fuzz.cpp -o $dir/fuzz -lpthread
FUZZ_SEEDS=$dir/seeds $dir/fuzz
fuzz() { # kind
    mkdir -p $dir/corpus_"$1"
    FUZZ=$1 $dir/fuzz -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -artifact_prefix=$dir/bad_"$1"_ \
        $dir/corpus_"$1" $dir/seeds/"$1" > $dir/"$1".txt 2>&1
}
failed=0 cores=$(nproc) pids=()
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
for i in "${!kinds[@]}"; do
    ((i < cores)) || wait "${pids[i - cores]}" || true
    fuzz "${kinds[i]}" &
    pids+=($!)
done
for i in "${!kinds[@]}"; do
    kind=${kinds[i]}
    if wait "${pids[i]}"; then
        echo "ok $kind: $(tail -n 1 $dir/"$kind".txt)"
    else
        echo "FAIL $kind:"
        grep -vE '^#[0-9]+[[:space:]]+(NEW|REDUCE|pulse|INITED|RELOAD)' $dir/"$kind".txt | tail -n 60
        failed=$((failed + 1))
    fi
done
echo "$((${#kinds[@]} - failed)) passed, $failed failed, 0 skipped"
((failed == 0))
