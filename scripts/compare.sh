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
# Python's own library is enough for bytes. The first text that can be had:
data=""
for text in tinyshakespeare austen; do # what is here already comes first
    ! grep -qs '"files"' data/${text}_byte/manifest.json || data=data/${text}_byte
done
for text in tinyshakespeare austen; do
    [[ ! $data ]] || break
    echo "trying $text"
    if scripts/data.py $text --tokenizer byte --out data/${text}_byte > /dev/null; then
        data=data/${text}_byte
        break
    fi
done
[[ $data ]] || fail "no text could be fetched (no network?); train on your own: scripts/data.py text:FILE says how"

# A byte-level model in both cases: a million characters teach spelling, names and the form of a play. (A 124M model on
# GPT-2 tokens would know so short a text by heart after a hundred steps; the README says how to train one on FineWeb.)
if ./train_gpt --version | grep -q cuda && nvidia-smi -L > /dev/null 2>&1; then
    runs=runs/small_gpu
    steps=1000
    flags=(--model d6 --seq_len 256 --batch 64 --warmup 100 --eval_every 100)
    say "a GPU: $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
    echo "training d6, 11 M parameters on the bytes of ${data#data/}, $steps steps with each of: ${optimizers[*]}"
else
    runs=runs/small_cpu
    steps=1000
    flags=(--layers 4 --heads 4 --channels 128 --seq_len 128 --batch 16 --warmup 50 --eval_every 50 --device cpu)
    say "no GPU in use ($(./train_gpt --version | grep -q cuda && echo "none found" || echo "this build has no CUDA")): the CPU"
    echo "training 4 layers of 128 channels, 0.8 M parameters on the bytes of ${data#data/}, $steps steps with each of:" \
        "${optimizers[*]}"
fi
flags+=(--train "$data/train_*.bin" --val "$data/val_*.bin" --steps "$steps" --sample_every "$steps" --sample_tokens 400
    --save_every 200)

for optimizer in "${optimizers[@]}"; do
    run=$runs/$optimizer
    case $optimizer in # each with its own learning rate
        adamw) command=(./train_gpt "${flags[@]}" --optimizer adamw --lr 4e-3 --out "$run") ;;
        *) command=(./train_gpt "${flags[@]}" --optimizer "$optimizer" --lr 4e-3 --muon_lr 1e-2 --out "$run") ;;
    esac
    say "$optimizer"
    if [[ -e $run/command && $(< "$run/command") != "${command[*]}" ]]; then
        fail "$run was made by another command ($(< "$run/command")); remove it to train anew"
    elif [[ -e $run/step_$(printf %08d "$steps").ckpt ]]; then
        echo "trained already: $run (remove it to train anew)"
        continue
    fi
    mkdir -p "$run"
    echo "${command[*]}" | tee "$run/command"
    # All lines go to the file. Shown are, of the step lines, the first and those with a validation loss; the sample later.
    "${command[@]}" --resume auto | tee -a "$run/output.txt" |
        sed -u '/^--- sample/,/^---$/d; /^step/ { /^step *1\//b; / val /b; d }' # line by line; mawk would wait for a block
done

say "what the last of them, ${optimizers[-1]}, writes after $steps steps"
awk '/^--- sample/ { text = ""; on = 1; next } /^---$/ { on = 0 } on { text = text $0 "\n" } END { printf "%s", text }' \
    "$runs/${optimizers[-1]}/output.txt"

say "side by side"
scripts/compare.py "${optimizers[@]/#/$runs/}" --png "$runs/compare.png"
