#!/usr/bin/env bash
# The training step of this program and of PyTorch (dev/peer_pytorch.py), one after the other on this machine's first GPU: T=1024, AdamW,
# random tokens.
#   scripts/bench.sh [--rows MODEL:BATCH,...] [--quick] [--limit SECONDS] [--name NAME] [--results DIR] [--dry_run]
#   --rows      which sizes [d12:4,d12:64,d24:16,d36:8,d48:16]
#   --quick     fewer steps, for a look
#   --limit     for each program of a row [300]. Where PyTorch needs longer to compile the whole model, a second attempt of as
#               long compiles a block at a time (slower steps, and the table says so)
#   --dry_run   prints the commands and runs nothing
# Writes NAME.md [bench], a table with machine, versions and commands, anew after each row, and NAME.log, into DIR [dev/results].
# llm.c's column is quoted from dev/results/peers.md. Installs nothing; without torch the peer's column stays empty.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "bench: $*" >&2; exit 2; }
line="scripts/bench.sh $*"
rows=d12:4,d12:64,d24:16,d36:8,d48:16 quick="" limit=300 name=bench results=dev/results dry=""
while (($#)); do
    case $1 in
        --quick) quick=1 ;;
        --dry_run) dry=1 ;;
        --rows | --limit | --name | --results)
            [[ ${2:-} ]] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift
            ;;
        *) fail "'$1' is no flag: see the head of this file" ;;
    esac
    shift
done
for row in ${rows//,/ }; do
    [[ $row =~ ^(d12|d24|d36|d48):[1-9][0-9]*$ ]] || fail "--rows $rows: '$row' is no MODEL:BATCH such as d12:64"
done
[[ $limit =~ ^[1-9][0-9]*$ ]] || fail "--limit $limit is no number of seconds"
[[ $dry ]] || nvidia-smi -L > /dev/null 2>&1 || fail "no GPU here (--dry_run shows what would run)"

steps=30 repeats=20 skipped=6 # steps before the median: clocks settle, the next batches are on their way
[[ ! $quick ]] || steps=14 repeats=8
at=build/bench log=$results/$name.log table=$results/$name.md
ours=(./train_gpt --train "$at/random/train_*.bin" --seq_len 1024 --optimizer adamw --steps "$steps")
peer=(python3 dev/peer_pytorch.py --only step --repeats "$repeats")

run() { # file command...: 0 if it ended well within the limit; the output goes into the file and the log
    local file=$1 status=0
    shift
    if [[ $dry ]]; then
        echo "timeout $limit $*"
        return 0
    fi
    echo "== $*" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" > "$file" 2>&1 < /dev/null || status=$?
    cat "$file" >> "$log"
    ((status == 0)) || echo "== exit status $status" | tee -a "$log"
    return $status
}
median() { sort -n | awk '{ x[NR] = $1 } END { if (NR) print (x[int((NR + 1) / 2)] + x[int(NR / 2) + 1]) / 2 }'; }
rates() { sed -nE 's/.*\| ([0-9]+) tok\/s.*/\1/p; s/.*"tokens_per_s": ([0-9.]+).*/\1/p' "$1" 2> /dev/null || true; } # ours, the peer's
in_k() { [[ ! $1 ]] || awk -v x="$1" 'BEGIN { printf "%.1fk", x / 1000 }'; }
over() { [[ ! $1 || ! $2 ]] || awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }
size() { case $1 in d12) echo 124M ;; d24) echo 350M ;; d36) echo 774M ;; d48) echo 1558M ;; esac; }
llmc() { sed -nE "s/^\| $1 \| ([^|]*) \|.*/\1/p" dev/results/peers.md | head -n 1; }
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader | head -n 1; }

lines=()
write_table() {
    local torch cuda nvcc
    torch=$(python3 -c 'import torch; print(torch.__version__)' 2> /dev/null) || torch="none here"
    nvcc=$(make info 2> /dev/null | sed -nE 's/^CUDA +([^,]*nvcc),.*/\1/p')
    cuda=$("${nvcc:-nvcc}" --version 2> /dev/null | sed -nE 's/.*release ([0-9.]+).*/\1/p') || cuda=unknown
    {
        echo "# The training step beside PyTorch"
        echo
        echo "$(query name), driver $(query driver_version), CUDA $cuda, PyTorch $torch, commit ${COMMIT:-$(git describe --always --dirty \
            --exclude='*' 2> /dev/null || echo unknown)}, $(date -u +%F). \`$line\`; its output: \`$name.log\`."
        echo
        echo "T=1024, random tokens, AdamW, tokens/s. Ours: \`${ours[*]} --model MODEL --batch B\`, the median from step $((skipped + 1)) on."
        echo "PyTorch: \`${peer[*]} --model MODEL --batch B\`, torch.compile, flash attention, fused AdamW on bf16 weights without fp32"
        echo "masters, the median of $repeats steps. llm.c was not run here: its column is of the H100 in [peers.md](peers.md)."
        echo
        echo "| | ours | PyTorch | ours / PyTorch | llm.c + cuDNN, one H100 |"
        echo "|---|---|---|---|---|"
        printf '%s\n' "${lines[@]}"
    } > "$table.tmp"
    mv "$table.tmp" "$table"
}

[[ $dry ]] || mkdir -p "$results" "$at" build
[[ $dry ]] || : > "$log"
run "$at/build.txt" make train_gpt || fail "the program does not build: see $log"
run "$at/random.txt" python3 scripts/random_tokens.py "$at/random/train_000.bin" || fail "no random tokens: see $log"
torch="" failed=""
if [[ $dry ]] || python3 -c 'import torch' 2> /dev/null; then torch=1; else echo "python3 has no torch: ours alone"; fi
for row in ${rows//,/ }; do
    model=${row%:*} batch=${row#*:} dir=$at/${row/:/_} mine="" theirs="" note=""
    [[ $dry ]] || { rm -rf "$dir" && mkdir -p "$dir"; }
    if run "$dir/ours.txt" "${ours[@]}" --model "$model" --batch "$batch"; then
        [[ $dry ]] || mine=$(rates "$dir/ours.txt" | tail -n +$((skipped + 1)) | median)
    else
        failed+=" ours:$row"
    fi
    if [[ $torch ]]; then
        command=("${peer[@]}" --model "$model" --batch "$batch")
        if ! run "$dir/peer.txt" "${command[@]}"; then
            note=" (a block compiled at a time)"
            run "$dir/peer.txt" "${command[@]}" --compile blocks || { failed+=" PyTorch:$row" note=""; }
        fi
        theirs=$(rates "$dir/peer.txt" | median)
    fi
    [[ ! $dry ]] || continue
    other=$(in_k "$theirs")
    lines+=("| $(size "$model") B=$batch | $(in_k "$mine") | $other${other:+$note} | $(over "$mine" "$theirs") | $(llmc "$(size "$model") B=$batch") |")
    write_table
done
[[ ! $dry ]] || exit 0
cat "$table"
[[ ! $failed ]] || { echo "bench: without a figure:$failed (see $log)" >&2; exit 1; }
