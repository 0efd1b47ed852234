#!/usr/bin/env bash
# The proof: GPT-2 124M on 100 M distinct tokens with AdamW, DMuon, Muon and Hierarchical Muon, each optimizer at the best of four
# rates, and the table of what each needs to come to tuned AdamW's loss. Stop it when you like: the same command goes on.
#   scripts/reproduce.sh [--data fineweb|linux|DIR] [--gpus N] [--minutes M] [--ablate] [--batch B] [--out DIR] [--size FLAGS]
#   --data      fineweb (the default where it can be reached), linux (what is taken elsewhere), or a directory of GPT-2 shards. For a
#               machine without a network: scripts/data.py linux --tokenizer gpt2 --tokens 160e6 --val_frac 0.02 --pack linux.txt.xz,
#               and there: scripts/data.py text:linux.txt.xz --tokenizer gpt2 --val_frac 0.02 --out DIR
#               (a mixture is a directory with links to the shards of several)
#   --gpus      GPUs for each run [all of this machine]
#   --minutes   ends in time, with the run that is under way saved; exit status 3: there is more to do
#   --ablate    instead: the choices inside DMuon, one at a time, at 30 M parameters with two seeds
#   --batch     sequences of a GPU at a time [64, or what divides a step among the GPUs]: no effect on what is learnt
#   --out       where the runs go [runs/proof, runs/ablations]
#   --size      flags for another size of model, data and schedule, to try the script itself
# Same for all runs: architecture, order of the data (but for the seeds), 131,072 tokens a step, 768 steps, and the schedule: 60
# steps of warm-up, constant to 40%, linear down to 2%. First four rates of each, and where the best is at an end of them up to two
# beyond; then the best of each with two more seeds, and vanilla Muon and Hierarchical Muon at DMuon's rate. 14 to 18 runs of
# 100.7 M tokens: three minutes each on an H200.
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} # see compare.sh

say() { printf '\n== %s\n' "$*"; }
fail() { echo "reproduce: $*" >&2; exit 1; }
usage() { echo "reproduce: $*: see the head of scripts/reproduce.sh" >&2; exit 2; }

data="" gpus="" minutes="" ablate="" batch="" out="" size=""
while (($#)); do
    case $1 in
        --ablate) ablate=yes ;;
        --data | --gpus | --minutes | --batch | --out | --size)
            [[ ${2:-} ]] || usage "$1 needs a value"
            declare "${1#--}=$2"
            shift
            ;;
        *) usage "'$1' is no flag of this script" ;;
    esac
    shift
done
for number in gpus batch; do
    [[ ! ${!number} || ${!number} =~ ^[0-9]+$ ]] || usage "--$number ${!number}: a whole number"
done
[[ ! $minutes || $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage "--minutes $minutes: a number"
out=${out:-runs/$([[ $ablate ]] && echo ablations || echo proof)}
found=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
[[ " $size" != *" --device cpu"* ]] || found=0
gpus=${gpus:-$found}
((found > 0)) || [[ $size ]] || fail "no GPU here; --size '--device cpu --layers 2 ...' tries the script without one"
((gpus <= found)) || fail "--gpus $gpus: this machine has $found"
[[ -x train_gpt ]] || make

# --- What all runs have in common ------------------------------------------------------------------------------------------------

ranks=$((gpus > 1 ? gpus : 1))
if [[ $size ]]; then
    read -ra common <<< "$size"
elif [[ $ablate ]]; then
    common=(--model d6 --seq_len 1024 --batch "${batch:-$((32 / ranks))}" --total_batch 32768 --steps 600 --warmup 60
        --eval_every 100 --eval_tokens 524288 --save_every 200)
else
    most=$((128 / ranks)) # sequences of a step for each GPU
    common=(--model d12 --seq_len 1024 --batch "${batch:-$((most < 64 ? most : 64))}" --total_batch 131072 --steps 768 --warmup 60
        --eval_every 32 --eval_tokens 524288 --save_every 256)
fi
common+=(--schedule wsd --decay_frac 0.6 --final_lr_frac 0.02)
((gpus < 2)) || common+=(--gpus "$gpus")
[[ " ${common[*]}" =~ \ --steps\ ([0-9]+) ]] || usage "--size: --steps N is missing"
steps=${BASH_REMATCH[1]}

mkdir -p "$out"
if [[ ! $data ]]; then # the second time as the first
    data=$(cat "$out/data" 2> /dev/null || true)
fi
shards() { # where they are; empty if this source can't be reached
    case $1 in
        fineweb) scripts/data.py fineweb10B --tokenizer gpt2 --shards 2 --out data/proof_fineweb > /dev/null && echo data/proof_fineweb ;;
        linux) scripts/data.py linux --tokenizer gpt2 --tokens 160e6 --val_frac 0.02 --out data/proof_linux > /dev/null && echo data/proof_linux ;;
        *) echo "$1" ;;
    esac
}
say "data"
if [[ $data ]]; then
    directory=$(shards "$data") || fail "--data $data: can't be had here"
elif directory=$(shards fineweb); then
    data=fineweb
else
    echo "FineWeb can't be reached: the sources of Linux instead"
    directory=$(shards linux) || fail "neither can the package linux-source: bring your own, --data DIR"
    data=linux
fi
ls "$directory"/{train,val}_*.bin > /dev/null 2>&1 || fail "$directory has no train_*.bin and val_*.bin: scripts/data.py makes them"
common+=(--train "$directory/train_*.bin" --val "$directory/val_*.bin")
tokens=$(($(cat "$directory"/train_*.bin | wc -c) / 2))
needed=$([[ " ${common[*]}" =~ \ --total_batch\ ([0-9]+) ]] && echo $((steps * BASH_REMATCH[1])) || echo 0)
echo "$data: $((tokens / 1000000)) M tokens, of which a run reads $((needed / 1000000)) M"
((tokens > needed)) || fail "$directory has $tokens tokens, and a run needs $needed distinct ones"

# Runs that differ in these would not belong into one table.
machine=$([[ $found -gt 0 ]] && echo "$ranks x $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)" || echo CPU)
of="$machine; ${common[*]}"
[[ ! -e $out/of || $(< "$out/of") == "$of" ]] ||
    fail "the runs in $out are of ($(< "$out/of")), these would be of ($of): choose another --out"
echo "$of" > "$out/of"
echo "$data" > "$out/data"

# --- One run -----------------------------------------------------------------------------------------------------------------------

limit=$(awk "BEGIN { print int(60 * ${minutes:-0}) }")
margin=$((limit / 20 < 15 ? limit / 20 : 15)) # seconds in which a run that is told to stop has saved
deadline=$((limit - margin))                  # by bash's SECONDS, those of this script
time_is_up() {
    say "time is up; the same command goes on"
    exit 3
}
pid="" told=""
trap 'told=yes; [[ ! $pid ]] || kill -TERM "$pid" 2> /dev/null || true' INT TERM HUP # the trainer saves before it ends

finished() { # name
    [[ -e $out/$1/diverged ]] || tail -n 1 "$out/$1/log.jsonl" 2> /dev/null | grep -q "^{\"step\": $steps,"
}

run() { # name flag...
    local name=$1 run=$out/$1 status=0 clock="" shown begin
    shift
    ! finished "$name" || return 0
    [[ ! $told ]] || exit 130
    [[ ! $minutes ]] || ((deadline - SECONDS >= 2 * margin)) || time_is_up
    say "$name: $*"
    mkdir -p "$run"
    # In the background, where Ctrl-C does not reach it: this script tells it once, and a second time would end it at once.
    touch "$run/output.txt"
    begin=$(($(wc -c < "$run/output.txt") + 1))
    ./train_gpt "${common[@]}" "$@" --out "$run" --resume auto >> "$run/output.txt" 2>&1 &
    pid=$!
    tail -c +$begin -s 0.1 -f --pid=$pid "$run/output.txt" | sed -u '/^step/ { / val /!d }; /^|/d' &
    shown=$!
    if [[ $minutes ]]; then
        sleep $((deadline - SECONDS)) &
        clock=$!
        wait -n "$pid" "$clock" || true
        kill "$clock" 2> /dev/null || kill -USR1 "$pid" 2> /dev/null || true # the clock is gone: its time is up
    fi
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || true; done # a signal ends a wait
    wait "$pid" || status=$?
    pid=""
    wait "$shown" || true
    if finished "$name"; then
        rm -f "$run"/step_* # the weights: a gigabyte and a half each
    elif tail -n 3 "$run/output.txt" | grep -q 'had a loss or gradient that is not finite'; then
        echo "$name: diverged"
        touch "$run/diverged"
        rm -f "$run"/step_*
    elif ((status == 128 + 10)); then
        time_is_up
    elif [[ $told ]]; then
        exit 130
    else
        fail "$name ended with exit status $status: $(tail -n 1 "$run/output.txt")"
    fi
}

# --- The plan ------------------------------------------------------------------------------------------------------------------------

report() { # proof.py's arguments
    say "table"
    {
        echo "machine: $machine"
        echo "commit: ${COMMIT:-$(git describe --always --dirty --exclude='*' 2> /dev/null || echo unknown)}"
        echo "date: $(date -u +%F)"
        echo "all runs: ./train_gpt ${common[*]}"
        echo
        scripts/proof.py "$out" "$@"
    } | tee "$out/table.md"
}

if [[ $ablate ]]; then
    variants=(
        "base"
        "coefficients_keller --ns_coefficients keller" "coefficients_you --ns_coefficients you"
        "gram_bf16 --ns gram" "gram_fp16 --ns gram --ns_dtype fp16" "standard_fp16 --ns_dtype fp16"
        "qkv_fused --muon_qkv fused" "qkv_heads --muon_qkv heads"
        "steps_4 --ns_steps 4" "steps_3 --ns_steps 3"
        "momentum_0.9 --muon_momentum 0.9" "momentum_0.98 --muon_momentum 0.98"
        "nesterov_0 --nesterov 0"
        "tile_128 --muon_tile 128"
    )
    for seed in 1337 1338; do
        for variant in "${variants[@]}"; do
            read -ra words <<< "$variant"
            # The rates of d6 in compare.sh.
            run "${words[0]}_seed$seed" --optimizer dmuon --lr 4e-3 --muon_lr 1e-2 --seed $seed "${words[@]:1}"
        done
    done
    report --ablations
    exit
fi

adamw=(--optimizer adamw)
dmuon=(--optimizer dmuon)
muon=(--optimizer muon --muon_batch one) # vanilla: every matrix on every rank, one after the other
hierarchical=(--optimizer dmuon --muon_tile 256)
rate() { echo "--lr $1$([[ $2 == adamw ]] || echo " --muon_lr $1")"; } # Moonlight's scale: AdamW's rates carry over

# The likelier rates first, so that a plan that is cut short has its best.
adamw_rates=(1.2e-3 1.8e-3 2.7e-3 8e-4) dmuon_rates=(2.4e-3 3.6e-3 1.2e-3 4.8e-3)
for i in 0 1 2 3; do
    # shellcheck disable=SC2046 # words
    {
        run "adamw_${adamw_rates[i]}_seed1337" "${adamw[@]}" $(rate "${adamw_rates[i]}" adamw)
        run "dmuon_${dmuon_rates[i]}_seed1337" "${dmuon[@]}" $(rate "${dmuon_rates[i]}" dmuon)
    }
done
for optimizer in adamw dmuon; do
    while beyond=$(scripts/proof.py "$out" --beyond $optimizer) && [[ $beyond ]]; do
        # shellcheck disable=SC2046 # words
        run "${optimizer}_${beyond}_seed1337" --optimizer $optimizer $(rate "$beyond" $optimizer)
    done
done
best_adamw=$(scripts/proof.py "$out" --best adamw)
best_dmuon=$(scripts/proof.py "$out" --best dmuon)
# shellcheck disable=SC2046
{
    run "muon_${best_dmuon}_seed1337" "${muon[@]}" $(rate "$best_dmuon" muon)
    run "hierarchical_${best_dmuon}_seed1337" "${hierarchical[@]}" $(rate "$best_dmuon" dmuon)
    for seed in 1338 1339; do
        run "adamw_${best_adamw}_seed$seed" "${adamw[@]}" $(rate "$best_adamw" adamw) --seed $seed
        run "dmuon_${best_dmuon}_seed$seed" "${dmuon[@]}" $(rate "$best_dmuon" dmuon) --seed $seed
    done
}
report
