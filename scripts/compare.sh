#!/usr/bin/env bash
# Trains the same small model on the same text with several optimizers and puts them side by side.
#   scripts/compare.sh [adamw] [muon] [dmuon] [--no_setup]     all three if none is named; --no_setup: installs nothing
# Runs that are finished are not trained again; one that was interrupted goes on. Everything is in runs/small_{cpu,gpu}.
set -euo pipefail
cd "$(dirname "$0")/.."
# Threads that wait for one another spin for a moment only: where something else wants a core, a step would take many times as
# long otherwise.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}

say() { printf '\n== %s\n' "$*"; }
fail() { echo "compare: $*" >&2; exit 1; }

optimizers=() setup=yes
for argument in "$@"; do
    case $argument in
        adamw | muon | dmuon) optimizers+=("$argument") ;;
        --no_setup) setup="" ;;
        *) fail "'$argument' is none of adamw, muon, dmuon, --no_setup" ;;
    esac
done
((${#optimizers[@]})) || optimizers=(adamw muon dmuon)

if [[ $setup ]]; then
    say "tools"
    scripts/setup.sh
fi
say "build"
make

say "data"
# Python's own library is enough for bytes. The first text that can be had: Austen's six novels come from a Debian mirror, as the
# tools do, and are long enough not to be learnt by heart.
data=""
for text in austen tinyshakespeare; do # what is here already comes first
    [[ ! $data ]] || break
    ! grep -qs '"files"' data/${text}_byte/manifest.json || data=data/${text}_byte
done
for text in austen tinyshakespeare; do
    [[ ! $data ]] || break
    echo "trying $text"
    ! scripts/data.py $text --tokenizer byte --out data/${text}_byte > /dev/null || data=data/${text}_byte
done
[[ $data ]] || fail "no text could be fetched (no network?); train on your own: scripts/data.py text:FILE says how"

# Each optimizer at the best rates of a small sweep, or the comparison would be one of rates.
if ./train_gpt --version | grep -q cuda && nvidia-smi -L > /dev/null 2>&1; then
    # -- On a GPU: d6, 11 M parameters (a 124M model on GPT-2 tokens would know so short a text by heart after a hundred steps; the
    # README says how to train one on FineWeb). 800 steps read Austen's 3.6 M training bytes 3.6 times: in a run of 1500 steps dmuon's
    # validation loss was 0.02 above its training loss at step 800, 0.09 at 1000, and 0.30 at the end, where it had risen again.
    where=gpu steps=800 eval_tokens=131072
    model=(--model d6 --seq_len 256 --batch 64 --warmup 100)
    declare -A rates=([adamw]="--lr 4e-3" [muon]="--lr 4e-3 --muon_lr 1e-2")
    say "a GPU: $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
else
    # -- On a CPU: 0.8 M parameters learn spelling, names, the form of a dialogue. The sweep is dev/results/demo_cpu.log, validation
    # losses: adamw --lr 4e-3 1.599, 8e-3 1.562, 1.2e-2 1.538, 1.6e-2 2.467; dmuon --lr/--muon_lr 4e-3/2e-2 1.324, 8e-3/2e-2 1.310,
    # 8e-3/1e-2 1.281.
    where=cpu steps=800 eval_tokens=40960
    model=(--layers 4 --heads 4 --channels 128 --seq_len 128 --batch 16 --warmup 50 --device cpu)
    declare -A rates=([adamw]="--lr 1.2e-2" [muon]="--lr 8e-3 --muon_lr 1e-2")
    say "no GPU in use ($(./train_gpt --version | grep -q cuda && echo "none found" || echo "this build has no CUDA")): the CPU"
fi
rates[dmuon]=${rates[muon]} # the same mathematics
runs=runs/small_$where
flags=("${model[@]}" --train "$data/train_*.bin" --val "$data/val_*.bin" --steps "$steps" --eval_every 100 --eval_tokens "$eval_tokens"
    --sample_every "$steps" --sample_tokens 400 --save_every 200)

# Fills `command`, of the run of one optimizer.
command_of() {
    local rate
    read -ra rate <<< "${rates[$1]}"
    command=(./train_gpt "${flags[@]}" --optimizer "$1" "${rate[@]}" --out "$runs/$1")
}

# Which are to be trained, and how long that will take: the median of a few steps, times their number, and an evaluation
# costs about as much as six.
todo=() total=0 times=""
for optimizer in "${optimizers[@]}"; do
    command_of "$optimizer"
    run=$runs/$optimizer
    if [[ -e $run/command && $(< "$run/command") != "${command[*]}" ]]; then
        fail "$run was made by another command ($(< "$run/command")); remove it to train anew"
    elif [[ -e $run/step_$(printf %08d "$steps").safetensors ]]; then
        echo "trained already: $run (remove it to train anew)"
        continue
    fi
    todo+=("$optimizer")
    tenths=$(./train_gpt "${model[@]}" --warmup 0 --train "$data/train_*.bin" --steps 15 --optimizer "$optimizer" |
        sed -nE 's/^step .* ([0-9]+)\.([0-9])[0-9]* ms .*/\1\2/p' | sort -n | sed -n 8p) # of a millisecond
    seconds=$((tenths * (steps + 6 * steps / 100) / 10000 + 1))
    total=$((total + seconds))
    times+="${times:+, }$optimizer $seconds s"
done
if ((${#todo[@]})); then
    echo "$steps steps on the bytes of ${data#data/} with each of: ${todo[*]}"
    echo "on this machine, as busy as it is now: about $((total / 60)) min $((total % 60)) s ($times)"
fi

for optimizer in "${todo[@]}"; do
    command_of "$optimizer"
    run=$runs/$optimizer
    say "$optimizer"
    mkdir -p "$run"
    echo "${command[*]}" | tee "$run/command"
    # All lines go to the file. Shown are, of the step lines, the first and those with a validation loss; the sample later. Ctrl-C
    # is for the trainer alone, which saves before it ends and has something to say.
    "${command[@]}" --resume auto | (
        trap '' INT
        tee -a "$run/output.txt" | sed -u '/^--- sample/,/^---$/d; /^step/ { /^step *1\//b; / val /b; d }' # line by line; mawk would wait
    )
done

say "what the last of them, ${optimizers[-1]}, writes after $steps steps"
awk '/^--- sample/ { text = ""; on = 1; next } /^---$/ { on = 0 } on { text = text $0 "\n" } END { printf "%s", text }' \
    "$runs/${optimizers[-1]}/output.txt"

say "side by side"
scripts/compare.py "${optimizers[@]/#/$runs/}" --png "$runs/compare.png"
