#!/usr/bin/env bash
# What the sanitizers of the compiler see on the host: test/sanitize.sh. Ends with "N passed, N failed, N skipped". On a GPU
# compute-sanitizer looks at the kernels: scripts/gpu_check.sh sanitize.
#   thread    the loader's prefetch and the thread that saves on rank 0, in their tests and in a run
#   address   reads and writes outside, undefined behaviour, and leaks, over runs that train, evaluate, write samples,
#             save, stop and go on
# Built without OpenMP, BLAS and MPI: those libraries know nothing of sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."
self=test/$(basename "$0")
dir=build/sanitize
mkdir -p $dir
passed=0 failed=0

# setarch -R: an address space laid out at random may leave the thread sanitizer no room on newer kernels
plain_layout=()
! setarch -R true 2> /dev/null || plain_layout=(setarch -R)
export TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1
# What a backend allocates lives until the process ends.
export LSAN_OPTIONS=suppressions=$PWD/$dir/leaks:print_suppressions=0

# One of the checks below: sanitize.sh run PROGRAM OPTIMIZER
if [[ ${1:-} == run ]]; then
    out=$dir/run_$2_$3
    train=("${plain_layout[@]}" "$dir/$2" --device cpu --train "$dir/data/train_*.bin" --val "$dir/data/val_*.bin" --layers 2 --heads 2
        --channels 32 --seq_len 32 --batch 4 --total_batch 256 --optimizer "$3" --eval_every 5 --eval_tokens 512 --sample_every 8
        --sample_tokens 20 --save_every 6 --out "$out")
    rm -rf "$out"
    "${train[@]}" --steps 12
    "${train[@]}" --steps 20 --resume auto
    "${train[@]}" --steps 100000 --resume auto & # and one that is asked to stop
    while [[ $(tail -n 1 "$out/log.jsonl") == '{"step": 20,'* ]]; do sleep 0.1; done
    kill -TERM $!
    status=0
    wait $! || status=$?
    ((status == 128 + 15))
    exit
fi

check() { # name command...
    local name=$1 start=$SECONDS
    shift
    if timeout --kill-after=10 900 "$@" > "$dir/$name.txt" 2>&1; then
        echo "ok $name ($((SECONDS - start)) s)"
        passed=$((passed + 1))
    else
        echo "FAIL $name:"
        tail -n 60 "$dir/$name.txt"
        failed=$((failed + 1))
    fi
}
compile=("${CXX:-g++}" -x c++ -std=c++17 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -Wno-unknown-pragmas -I.)
printf 'leak:CpuOps::alloc\n' > $dir/leaks
rm -rf $dir/data
cat ./*.h > $dir/text.txt
python3 scripts/data.py text:$dir/text.txt --out $dir/data > /dev/null 2>&1

check build_thread_host "${compile[@]}" -fsanitize=thread test/test_host.cpp -o $dir/thread_host -lpthread
check build_thread_comm "${compile[@]}" -fsanitize=thread test/test_comm.cpp -o $dir/thread_comm -lpthread
check build_thread "${compile[@]}" -fsanitize=thread train_gpt.cu -o $dir/thread -lpthread
check build_address "${compile[@]}" -fsanitize=address,undefined train_gpt.cu -o $dir/address -lpthread
check thread_loader "${plain_layout[@]}" $dir/thread_host -tc='loader*' -tce='*5 GB*'
check thread_save "${plain_layout[@]}" $dir/thread_comm -tc='--gpus: rank 0 may take long over a disk,--gpus N starts*'
for optimizer in adamw dmuon; do
    check "thread_run_$optimizer" "$self" run thread $optimizer
    check "address_run_$optimizer" "$self" run address $optimizer
done
echo "$passed passed, $failed failed, 0 skipped"
((failed == 0))
