#!/usr/bin/env bash
# What only a GPU can show, with a log to keep. Installs nothing and needs no network.
#   scripts/gpu_check.sh PART... [--data DIR] [--steps N] [--minutes N] [--name NAME] [--results DIR] [--limit SECONDS]
#                        [--budget SECONDS] [--gpus N] [--dry_run]
#   tests      builds, and runs the whole suite on the GPU; with several GPUs also the tests of ranks on them
#   kernels_bf16, kernels_fp32   of these the kernels and the golden run alone, in one precision
#   ladders    the ladders of dev/
#   sanitize   compute-sanitizer over the kernel tests, at reduced sizes: memcheck, racecheck, initcheck,
#              synccheck
#   promises   the four that follow:
#   repeat     two runs with one seed, adamw and dmuon: the same checkpoint, byte for byte
#   sanitize_run   compute-sanitizer over five steps of training, the same four tools, adamw and dmuon
#   refusals   GPUs that are hidden, full, too few, shared by two ranks, NCCL on a network that is not there: each ends in a
#              line that helps
#   soak       --minutes [10] of kills and resumes on the GPU: test/soak.py
#   demo       what scripts/demo.sh does on a GPU, with the text that it has fetched before or can fetch
#   train      124M (GPT-2 small) for --steps steps [600] on the GPT-2 shards in --data, with adamw, muon and dmuon
#   train_pytorch   the same in PyTorch, with AdamW and Muon
#   bench      124M to 1558M, T=1024, random tokens: step and optimizer time with adamw and dmuon on one GPU, of 124M also
#              with muon, of 124M and 350M also on all GPUs
#   peers      the same sizes in PyTorch
#   ranks      several GPUs: the same 100 steps of 124M, random tokens, on one GPU and on all, started both ways
#   many       several GPUs, all that is to be known of them in --budget [530] seconds, the build included: 100 steps with dmuon
#              against one GPU, steps of 124M and 1558M, communication that is waited for, dev/bench_optimizer, tests of ranks, 1, 2,
#              4, 8 GPUs, and a table of it. What there is no time for is left out, and said. --gpus takes fewer than are here.
#              Beside the log: NAME_trace.json (scripts/timeline.py), NAME_bench.jsonl
#   all        tests, sanitize, train, train_pytorch, bench and peers, in this order
# Writes dev/results/NAME.log [gpu_check]; train adds the curves, NAME.png and NAME_OPTIMIZER.jsonl. Each program gets --limit [1800] s.
# --dry_run prints the commands, each with its limit, and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "gpu_check: $*" >&2; exit 2; }
line="scripts/gpu_check.sh $*"
parts=() data="" steps=600 minutes=10 name=gpu_check results=dev/results limit=1800 budget=530 gpus="" dry=""
while (($#)); do
    case $1 in
        promises) parts+=(repeat sanitize_run refusals soak) ;;
        repeat | sanitize_run | refusals | soak | tests | kernels_bf16 | kernels_fp32 | ladders | sanitize | demo | train | train_pytorch | \
            bench | peers | ranks | many) parts+=("$1") ;;
        all) parts=(tests sanitize train train_pytorch bench peers) ;;
        --dry_run) dry=1 ;;
        --data | --steps | --minutes | --name | --results | --limit | --budget | --gpus)
            [[ ${2:-} ]] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift
            ;;
        *) fail "'$1' is neither a part nor a flag: see the head of this file" ;;
    esac
    shift
done
random=build/gpu_check_random
((${#parts[@]})) || fail "which part? see the head of this file"
[[ ! " ${parts[*]} " =~ \ (train|train_pytorch)\  ]] || ls "$data"/train_*.bin "$data"/val_*.bin > /dev/null 2>&1 ||
    fail "${parts[*]}: needs --data DIR with train_*.bin and val_*.bin: scripts/data.py --tokenizer gpt2 makes them"
for number in "$limit" "$budget" "${gpus:-1}"; do [[ $number =~ ^[1-9][0-9]*$ ]] || fail "'$number' is no whole number from 1 on"; done
[[ $dry ]] || nvidia-smi -L > /dev/null 2>&1 || fail "no GPU here (--dry_run shows what would run)"
if [[ ! $gpus ]]; then
    [[ ! $dry ]] || fail "--dry_run needs --gpus N"
    gpus=$(nvidia-smi -L | wc -l)
fi

part() { # title command...: into the log and onto the screen
    local title=$1 status=0
    shift
    if [[ $dry ]]; then
        echo "$title: timeout $limit $*"
        return
    fi
    printf '\n== %s\n' "$title" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log" || status=$?
    ((status == 0)) || { failed+=("$title"); echo "== $title: exit status $status" | tee -a "$log"; }
}

failed=()
log=$results/$name.log
if [[ $dry ]]; then log=/dev/null; else mkdir -p "$results" build; fi
query() { nvidia-smi --query-gpu="$1" --format=csv,noheader | head -n 1; }
find_nvcc() { make info | sed -nE 's/^CUDA +([^,]*nvcc),.*/\1/p'; }
header() {
    local nvcc
    nvcc=$(find_nvcc)
    echo "gpu: $(query name)"
    echo "gpus: $(nvidia-smi -L | wc -l)"
    echo "driver: $(query driver_version)"
    echo "cuda: $("${nvcc:-nvcc}" --version | sed -nE 's/.*release ([0-9.]+).*/\1/p')"
    echo "commit: ${COMMIT:-$(git describe --always --dirty --exclude='*' 2> /dev/null || echo unknown)}"
    echo "date: $(date -u +%F)"
    echo "command: $line"
}
[[ $dry ]] || header | tee "$log"

if [[ " ${parts[*]} " == *" many "* ]]; then
    part build make --jobs=2 train_gpt build/bench_optimizer
else
    part build make train_gpt
fi

tests() {
    part suite scripts/test.sh --no_setup
    local name
    for name in test_cuda_bf16 test_cuda_fp32 test_ranks_cuda; do
        [[ ! -e build/log/$name.txt ]] || part "$name, as the suite ran it" cat build/log/$name.txt
    done
}

kernels() { # precision
    part "build of the tests" make "build/test_cuda_$1"
    part "kernels and golden run, $1" "build/test_cuda_$1" --duration
}
kernels_bf16() { kernels bf16; }
kernels_fp32() { kernels fp32; }

ladders() {
    local ladder
    part "build of the ladders" make dev
    for ladder in dev/*.cu; do
        [[ $ladder == */bench_* ]] || part "$ladder" "build/$(basename "$ladder" .cu)"
    done
}

# The runs side by side. racecheck is the slowest by far: it goes case by case, without those that train whole models (they are
# sanitize_run's), through a build in which every lane arrives at an mbarrier for itself (kernels/wgmma.cuh).
sanitize() {
    local runs=() run tool precision cases without count log_of=build/log/sanitize
    part "build of the tests" make build/test_cuda_{,races_}{bf16,fp32}
    mkdir -p build/log
    check() { # tool precision program cases doctest's flags...
        if [[ $dry ]]; then
            echo "$1, $2, cases: $4: timeout $limit compute-sanitizer --tool $1 build/test_cuda_$3 ${*:5}"
            return
        fi
        TEST_SMALL=1 OMP_NUM_THREADS=2 timeout --kill-after=10 "$limit" compute-sanitizer --tool "$1" --error-exitcode 1 \
            "build/test_cuda_$3" "${@:5}" > "${log_of}_$1_$2_$4.txt" 2>&1 &
        runs+=("$1 $2 $4 $!")
    }
    without='golden*,*cuBLAS*,*sizes of a GPU,*2^32*'
    for precision in bf16 fp32; do
        for tool in memcheck initcheck synccheck; do check $tool $precision $precision all "--test-case-exclude=$without"; done
    done
    without+=',recompute*,graph*,head*,tune*,memory*'
    for precision in bf16 fp32; do
        count=1
        [[ $dry ]] || count=$("build/test_cuda_races_$precision" --count "--test-case-exclude=$without" | sed -nE 's/.*filters: ([0-9]+).*/\1/p')
        for ((cases = 1; cases <= count; cases++)); do
            check racecheck $precision races_$precision $cases "--test-case-exclude=$without" --first=$cases --last=$cases --duration
        done
    done
    for run in "${runs[@]}"; do
        local status=0 pid
        read -r tool precision cases pid <<< "$run"
        wait "$pid" || status=$?
        # shellcheck disable=SC2016 # the inner shell expands them
        part "$tool, $precision, cases: $cases" bash -c 'cat "$1"; exit "$2"' - "${log_of}_${tool}_${precision}_$cases.txt" $status
    done
}

tiny=(--layers 2 --heads 2 --channels 128 --seq_len 64 --batch 2 --train "$random/train_*.bin")

repeat() {
    local optimizer at=build/gpu_check_repeat
    random_tokens
    [[ $dry ]] || rm -rf $at
    for optimizer in adamw dmuon; do
        for run in one two; do
            part "$optimizer, run $run" ./train_gpt --model d6 --batch 8 --seq_len 512 --train "$random/train_*.bin" --device cuda \
                --optimizer $optimizer --steps 200 --warmup 20 --save_every 100 --keep 9 --out $at/$optimizer/$run
        done
        # shellcheck disable=SC2016 # the inner shell expands them
        part "$optimizer: the same bytes" bash -c 'cd "$1" && ls one/*.safetensors && for file in one/*.safetensors; do
            cmp "$file" "two/${file#one/}"; done' - $at/$optimizer
    done
    [[ $dry ]] || rm -rf $at
}

# Our own kernels as the tool reports them: it also finds races in cuBLAS's split sums (nvjet), which are not ours to judge, and to leave
# those kernels out (--kernel-name-exclude) ends in memory errors.
ours_without_races() { # command...
    "$@" > build/gpu_check_races 2>&1 || { cat build/gpu_check_races; return 1; }
    cat build/gpu_check_races
    ! grep -E 'Race reported|and (Read|Write) access' build/gpu_check_races | grep -qv nvjet
}
export -f ours_without_races

# Without the graph, so that each kernel is checked by itself; long enough that the rings of Hopper's kernels go round. racecheck takes a
# build of its own, as in sanitize().
sanitize_run() {
    local tool optimizer command flags=(--layers 2 --heads 4 --channels 256 --seq_len 512 --batch 2 --train "$random/train_*.bin")
    random_tokens
    part "build for racecheck" make build/train_gpt_races
    for tool in memcheck racecheck initcheck synccheck; do
        for optimizer in adamw dmuon; do
            command=(./train_gpt "${flags[@]}" --device cuda --tune 0 --graph 0 --optimizer "$optimizer" --steps 5)
            if [[ $tool == racecheck ]]; then
                command[0]=build/train_gpt_races
                # shellcheck disable=SC2016 # the inner shell expands them
                part "$tool, five steps, $optimizer" bash -c 'ours_without_races "$@"' - compute-sanitizer --tool $tool "${command[@]}"
            else
                part "$tool, five steps, $optimizer" compute-sanitizer --tool $tool --error-exitcode 1 "${command[@]}"
            fi
        done
    done
}

# The command fails, with one line on stderr that has these words, in a minute.
says() { # words command...
    local words=$1 status=0
    shift
    timeout --kill-after=10 60 "$@" 2> build/gpu_check_said > /dev/null || status=$?
    cat build/gpu_check_said
    ((status != 0 && status < 124)) && [[ $(grep -c '^train_gpt: ' build/gpu_check_said) == 1 ]] && grep -qE "$words" build/gpu_check_said
}
export -f says
refused() { # title words command...
    # shellcheck disable=SC2016 # the inner shell expands them
    part "$1" bash -c 'says "$@"' - "${@:2}"
}

refusals() {
    local here=$gpus left
    [[ $dry ]] || here=$(nvidia-smi -L | wc -l)
    random_tokens
    refused "hidden" 'leaves none' env CUDA_VISIBLE_DEVICES= ./train_gpt "${tiny[@]}" --device cuda --steps 2
    refused "too few" "$((here + 1)) are wanted and $here are here" ./train_gpt "${tiny[@]}" --gpus $((here + 1)) --steps 2
    if command -v mpirun > /dev/null; then
        refused "shared by two ranks" 'share GPU' env CUDA_VISIBLE_DEVICES=0 mpirun --allow-run-as-root --oversubscribe -n 2 \
            ./train_gpt "${tiny[@]}" --device cuda --steps 2
    fi
    if ((here > 1)); then
        refused "NCCL without a network" 'nccl' env NCCL_SOCKET_IFNAME=nonsense ./train_gpt "${tiny[@]}" --gpus 2 --steps 2
    fi
    [[ ! $dry ]] || return 0
    printf '%s\n' '#include <unistd.h>' 'int main(int, char **arguments) {' \
        '    size_t free, total, left = size_t(atoi(arguments[1])) << 20, piece = size_t(1) << 30; void *memory;' \
        '    while (piece >= 1 << 20) {' \
        '        if (cudaMemGetInfo(&free, &total)) return 1;' \
        '        if (free < left + piece || cudaMalloc(&memory, piece)) piece /= 2, cudaGetLastError();' \
        '    }' \
        '    write(1, "full\n", 5); pause();' '}' > build/gpu_check_fill.cu
    part "build of a program that fills a GPU" "$(find_nvcc)" -w build/gpu_check_fill.cu -o build/gpu_check_fill
    for left in 1 300; do
        coproc filler { exec build/gpu_check_fill $left; }
        read -r -t 60 _ <&"${filler[0]}" || true
        refused "all but $left MiB taken" 'memory' ./train_gpt --model d12 --batch 4 --train "$random/train_*.bin" --device cuda --steps 2
        # shellcheck disable=SC2154 # of the coprocess
        kill "${filler_PID:-}" 2> /dev/null || true
        wait 2> /dev/null || true
    done
}

soak() { limit=$((limit + 120 * minutes)) part "kills and resumes" python3 test/soak.py ./train_gpt --device cuda --minutes "$minutes"; }

demo() { part demo scripts/compare.sh adamw dmuon --no_setup; }

have_torch() { python3 -c 'import torch' 2> /dev/null; }

gpt2=(--model d12 --batch 32 --seq_len 1024)

train() {
    local at=build/gpu_check_train optimizer rate
    rm -rf "$at"
    mkdir -p "$at"
    for optimizer in adamw muon dmuon; do
        case $optimizer in # each with its own learning rate
            adamw) rate=(--lr 1.2e-3) ;;
            *) rate=(--lr 2.4e-3 --muon_lr 2.4e-3) ;;
        esac
        part "124M on $(basename "$data"), $optimizer" ./train_gpt "${gpt2[@]}" --train "$data/train_*.bin" --val "$data/val_*.bin" \
            --steps "$steps" --warmup 60 --schedule wsd --decay_frac 0.6 --final_lr_frac 0.02 --optimizer "$optimizer" "${rate[@]}" \
            --eval_every 50 --eval_tokens 589824 --sample_every "$steps" --out "$at/$optimizer"
        rm -f "$at/$optimizer/"*.safetensors
        cp "$at/$optimizer/log.jsonl" "$results/${name}_$optimizer.jsonl"
    done
    part "loss" python3 scripts/compare.py "$at/"{adamw,muon,dmuon} --png "$results/$name.png"
}

train_pytorch() {
    have_torch || { echo "train_pytorch: left out, python3 has no torch" | tee -a "$log"; return; }
    part "PyTorch, 124M on $(basename "$data")" python3 dev/peer_pytorch.py --data "$data" --steps "$steps"
}

random_tokens() { [[ $dry ]] || python3 scripts/random_tokens.py "$random/train_000.bin"; }

rows=(d12:4 d12:64 d24:16 d36:8 d48:16) # model:sequences of a GPU in a micro-step

bench() {
    local optimizer row n runs=()
    random_tokens
    for row in "${rows[@]}"; do
        for n in $(seq "$gpus"); do
            ((n == 1)) || [[ $row == d12:64 || $row == d24:16 ]] || continue
            for optimizer in adamw muon dmuon; do
                [[ $optimizer != muon || $row == d12:64 ]] || continue
                local run=build/gpu_check_bench/${row/:/_}_${n}gpu_$optimizer
                rm -rf "$run"
                part "${row/:/, B=}, $n GPU, $optimizer" ./train_gpt --model "${row%:*}" --batch "${row#*:}" \
                    --train "$random/train_*.bin" --optimizer "$optimizer" --steps 24 --profile --gpus "$n" --out "$run"
                rm -f "$run/"*.safetensors
                runs+=("$run")
            done
        done
    done
    part "medians" python3 scripts/compare.py "${runs[@]}" --png build/gpu_check_bench.png
}

peers() {
    have_torch || { echo "peers: left out, python3 has no torch" | tee -a "$log"; return; }
    local row
    for row in "${rows[@]}"; do
        part "${row/:/, B=}, PyTorch" python3 dev/peer_pytorch.py --model "${row%:*}" --batch "${row#*:}"
    done
}

# Largest difference of the losses of runs, against those of the first. The micro-batches are the same and their fp32 sums differ in the
# last bit; bf16 and 100 steps enlarge that, by how much the data decide: on random tokens (nothing to learn but their frequencies) to
# 0.00007 nats where this was written, while adamw and muon differ by up to 0.035. On text any last bit grows to 0.04 while the
# gradient's norm still jumps (dev/results).
same_losses() { # run run...
    part "losses of $*" python3 -c 'import json, sys
def losses(run): return [json.loads(line)["loss"] for line in open(f"{run}/log.jsonl")]
one = losses(sys.argv[1])
for run in sys.argv[2:]:
    worst = max(abs(a - b) for a, b in zip(one, losses(run), strict=True))
    print(f"{run}: largest difference over {len(one)} steps {worst:.6f} nats, last losses {one[-1]:.4f} {losses(run)[-1]:.4f}")
    assert worst < 0.001' "$@"
}

ranks() {
    local at=build/gpu_check_ranks
    local same=(--model d12 --batch 16 --total_batch 32768 --train "$random/train_*.bin" --optimizer dmuon --steps 100 --warmup 20)
    ((gpus > 1)) || fail "ranks needs two GPUs"
    random_tokens
    rm -rf $at
    mkdir -p $at
    part "1 rank" ./train_gpt "${same[@]}" --out $at/one
    part "--gpus $gpus" ./train_gpt "${same[@]}" --gpus "$gpus" --out $at/gpus
    part "mpirun -n $gpus" mpirun --allow-run-as-root -n "$gpus" ./train_gpt "${same[@]}" --out $at/mpirun
    same_losses $at/one $at/gpus $at/mpirun
    rm -rf $at/*/*.safetensors
}

within() { # seconds title command...: at most so long, and no longer than is left of the budget but for the tables
    local most=$1 left=$((budget - 15 - SECONDS)) limit
    shift
    limit=$((most < left ? most : left))
    if ((limit < 5)); then
        echo "== $1: left out, no time is left" | tee -a "$log"
        failed+=("$1 (left out)")
        return
    fi
    part "$@"
}

many() {
    local at=build/gpu_check_many n optimizer sequences=32
    export NCCL_NVLS_ENABLE=0 # multicast over NVLink stays off
    ((gpus > 1)) || fail "many needs two GPUs"
    [[ $dry ]] || { rm -rf $at; mkdir -p $at; random_tokens; }

    # The same 100 steps on one GPU and on all: 32 sequences a step, or as many as the GPUs divide, in the same micro-batches.
    ((sequences % gpus == 0)) || sequences=$((4 * gpus))
    local same=(--model d12 --batch $((sequences / gpus)) --total_batch $((1024 * sequences)) --train "$random/train_*.bin" --optimizer dmuon
        --steps 100 --warmup 20)
    within 60 "100 steps, 1 GPU" ./train_gpt "${same[@]}" --out $at/one
    within 60 "100 steps, $gpus GPUs" ./train_gpt "${same[@]}" --gpus "$gpus" --out $at/all
    same_losses $at/one $at/all

    # Whole steps, B=64 a GPU: on 8 GPUs that is 0.5 M tokens, on fewer these take micro-steps.
    local d12=(./train_gpt --model d12 --batch 64 --train "$random/train_*.bin" --profile)
    for optimizer in adamw dmuon; do
        within 40 "d12, B=64, $gpus GPUs, $optimizer" "${d12[@]}" --steps 30 --optimizer $optimizer --gpus "$gpus" --out $at/$optimizer
    done
    if ((gpus < 8 && 8 % gpus == 0)); then
        for optimizer in adamw dmuon; do
            within 40 "d12, 0.5 M tokens, $gpus GPUs, $optimizer" "${d12[@]}" --steps 16 --optimizer $optimizer --gpus "$gpus" --total_batch 524288
        done
    fi
    if ((64 % gpus == 0)); then
        for optimizer in adamw dmuon; do # no --out: a checkpoint is 18 GB
            within 60 "d48, 1 M tokens, $gpus GPUs, $optimizer" ./train_gpt --model d48 --batch 16 --train "$random/train_*.bin" --profile \
                --steps 8 --optimizer $optimizer --gpus "$gpus" --total_batch 1048576
        done
    fi
    within 90 "bench_optimizer, $gpus GPUs" build/bench_optimizer --gpus "$gpus" --seconds 0.3 --json "$at/bench.jsonl"
    # Of the tests of ranks what needs several GPUs most; `tests` runs all of them.
    within 150 "tests of ranks" python3 test/test_ranks.py ./train_gpt cuda delays_change_no_bit both_launchers_agree \
        killed_while_a_collective_is_in_flight
    for n in 1 2 4; do
        for optimizer in adamw dmuon; do
            ((n >= gpus)) || within 40 "d12, B=64, $n GPUs, $optimizer" "${d12[@]}" --steps 16 --optimizer $optimizer --gpus $n
        done
    done

    part "steps" python3 scripts/scaling.py "$log"
    [[ ! $dry ]] || return 0
    [[ ! -e $at/dmuon/trace.json ]] || cp $at/dmuon/trace.json "$results/${name}_trace.json"
    [[ ! -e $at/bench.jsonl ]] || cp $at/bench.jsonl "$results/${name}_bench.jsonl"
    rm -rf $at/*/*.safetensors
}

for wanted in "${parts[@]}"; do $wanted; done
[[ ! $dry ]] || exit 0
echo | tee -a "$log"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" | tee -a "$log"
    exit 1
fi
echo "all of it passed: ${parts[*]}" | tee -a "$log"
