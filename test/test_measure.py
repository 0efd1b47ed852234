#!/usr/bin/env python3
"""Tests of what measures on a GPU, without one: scripts/profile_kernels.py on samples in the formats of nsys and ncu, and
scripts/bench.sh, scripts/gpu_check.sh many and dev/precision_gap.py with programs in place of the trainer, of PyTorch and of nvidia-smi.

    python3 test/test_measure.py
"""
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import profile_kernels  # noqa: E402 (scripts/profile_kernels.py)

PRODUCT = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT"
LAYERNORM = "void layernorm_forward_kernel<(int)3, (bool)1>(__nv_bfloat16 *, __nv_bfloat16 *, float *, float *, int, int)"


def step(product_us):  # one step: names and microseconds
    return [("embedding_forward_kernel(__nv_bfloat16 *, const int *)", 10), (PRODUCT, product_us), (LAYERNORM, 20),
            ("void <unnamed>::strange<float>(float *)", 5), ("clip_scale_kernel(float *, long *)", 1), ("adamw_kernel(float)", 4)]


class Profile(unittest.TestCase):
    # Tuning's micro-step and the first step do not count; of the last one only that it begins.
    LAUNCHES = [step(900)[0]] + step(900) + step(100) + step(300) + step(900)

    def nsys(self):
        lines = ["Generating SQLite file run.sqlite from run.nsys-rep", "",
                 "Start (ns),Duration (ns),CorrId,GrdX,GrdY,GrdZ,BlkX,BlkY,BlkZ,Reg/Trd,StcSMem (MB),DymSMem (MB),Bytes (MB),"
                 "Throughput (MB/s),SrcMemKd,DstMemKd,Device,Ctx,GreenCtx,Strm,Name"]
        start = 1000
        for name, us in self.LAUNCHES:
            lines.append(f'{start},{us * 1000},1,132,1,1,256,1,1,64,0.000,0.000,,,,,NVIDIA H200 (0),1,,7,"{name}"')
            start += us * 1000 + 1000  # a gap of 1 us
        return lines

    def ncu(self):
        lines = ["==PROF== Connected to process 77 (/tmp/train_gpt)", "| device       | NVIDIA H200",
                 '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
                 '"CC","Section Name","Metric Name","Metric Unit","Metric Value"']
        for i, (name, us) in enumerate(self.LAUNCHES):
            value, unit = (f"{us * 1000:,}", "ns") if i % 2 else (f"{us}", "us")
            lines.append(f'"{i}","77","train_gpt","127.0.0.1","{name}","1","7","(256, 1, 1)","(132, 1, 1)","0","9.0",'
                         f'"Command line profiler metrics","gpu__time_duration.sum","{unit}","{value}"')
        return lines + ["==PROF== Disconnected from process 77"]

    def test_both_tools(self):
        for lines, spans in ((self.nsys(), True), (self.ncu(), False)):
            text = profile_kernels.table(profile_kernels.launches(lines))
            rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.M))
            self.assertEqual(rows["cuBLASLt"], "0.200 | 83.3% | 1")
            self.assertEqual(rows["LayerNorm, residual"], "0.020 | 8.3% | 1")
            self.assertEqual(rows["AdamW, norm, casts"], "0.005 | 2.1% | 2")
            self.assertEqual(rows["embedding"], "0.010 | 4.2% | 1")
            self.assertEqual(rows["all"], "0.240 | 100% | 6")
            self.assertIn("other: 0.005 ms void <unnamed>::strange<float>", text)
            self.assertEqual(rows.get("from one step's begin to the next"), "0.246 | gaps 2.4% of it |" if spans else None)

    def test_every_kernel_of_the_program_has_a_family(self):
        text = "".join(path.read_text() for path in [*(ROOT / "kernels").glob("*.cuh"), ROOT / "ns_kernels.cuh"])
        names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^;{]*?\)\s*)?(\w+_kernel)\(", text)
        self.assertGreater(len(names), 25)
        self.assertEqual(len(names), len(re.findall(r"^\s*(?:template.*\s)?__global__", text, re.M)))
        for name in names:
            if name != "hopper_probe_kernel":  # never launched
                self.assertNotEqual(profile_kernels.family(f"void {name}<1, 2>(float*)"), profile_kernels.OTHER, name)
        for name, of in (("hopper_forward_kernel<64>()", "attention"), ("void hopper_chain_kernel<1>()", "Newton-Schulz"),
                         ("void cutlass::Kernel2<layernorm_gemm>(int)", "cuBLASLt"), ("[CUDA memcpy HtoD]", "copies, memset"),
                         ("void cublasLt::splitKreduce_kernel<32, 16, int>()", "cuBLASLt"), ("ncclDevKernel_AllGather", "NCCL")):
            self.assertEqual(profile_kernels.family(name), of, name)

    def test_what_cannot_be_summed_is_one_line(self):
        with tempfile.TemporaryDirectory() as work:
            short, other = Path(work) / "short.csv", Path(work) / "other.csv"
            short.write_text("\n".join(self.nsys()[:12]))
            other.write_text("Time (%),Name\n1,x\n")
            for path, why in ((short, "fewer than three whole steps"), (other, "no kernel in it"), (Path(work) / "none", "cannot read")):
                done = subprocess.run([sys.executable, ROOT / "scripts/profile_kernels.py", path], capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (1, "", 1), done.stderr)
                self.assertIn(why, done.stderr)


    def test_a_run_with_the_trace_library(self):
        with tempfile.TemporaryDirectory() as work, mock.patch.object(profile_kernels, "ROOT", Path(work)):
            trace, program = Path(work) / "trace.csv", Path(work) / "train_gpt"
            with trace.open("w", newline="") as file:  # the columns that the library writes
                csv.writer(file).writerows([row[0], row[1], row[-1]] for row in csv.reader(self.nsys()[2:]))
            (Path(work) / "Makefile").write_text("build/kernel_trace.so:\n\techo library > $@\n")
            program.write_text('#!/bin/bash\ngrep -q library "$CUDA_INJECTION64_PATH" && [ "$*" = "--steps 3" ] && cp trace.csv "$KERNEL_TRACE"\n')
            program.chmod(0o755)
            self.assertEqual(profile_kernels.table(profile_kernels.launches(profile_kernels.run_tool("cupti", ["--steps", "3"]))),
                             profile_kernels.table(profile_kernels.launches(self.nsys())))
            program.write_text("#!/bin/bash\n")  # it never came to a GPU
            with self.assertRaisesRegex(ValueError, "no kernel in it"):
                profile_kernels.launches(profile_kernels.run_tool("cupti", []))

    def test_the_trace_library_compiles(self):
        if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
            self.skipTest("no CUDA Toolkit")
        built = subprocess.run(["make", "-B", "build/kernel_trace.so"], cwd=ROOT, capture_output=True, text=True)
        if re.search("cupti.h: No such file|cannot find -lcupti", built.stderr):
            self.skipTest("no CUPTI beside the CUDA Toolkit")
        self.assertEqual((built.returncode, "warning" in built.stderr), (0, False), built.stderr)
        names = subprocess.run(["nm", "-D", "--defined-only", ROOT / "build/kernel_trace.so"], check=True, capture_output=True, text=True)
        self.assertIn(" T InitializeInjection", names.stdout)


class Bench(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.dir = Path(temporary.name)
        for path in ("scripts/bench.sh", "scripts/random_tokens.py", "dev/results/peers.md"):
            (self.dir / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, self.dir / path)
        self.program("bin/nvidia-smi", 'case $* in *name*) echo "Some GPU" ;; *) echo 580.1 ;; esac')
        self.program("bin/make", "true")
        # Six slow steps, then 100, 300, 200: the median is 200k.
        self.program("train_gpt", 'for rate in 1 1 1 1 1 1 100000 300000 200000; do\n'
                                  '    echo "step 1/9 | loss 10.1 | 5.00 ms (optimizer 1.05) | $rate tok/s | MFU 52.1%"\ndone')
        self.torch("print('{\"what\": \"first step\", \"s\": 77.0}\\n{\"what\": \"training step\", \"tokens_per_s\": 160000.0}')")

    def program(self, path, text):
        (self.dir / path).parent.mkdir(exist_ok=True)
        (self.dir / path).write_text("#!/bin/bash\n" + text + "\n")
        (self.dir / path).chmod(0o755)

    def torch(self, peer):
        (self.dir / "lib").mkdir(exist_ok=True)
        (self.dir / "lib/torch.py").write_text("__version__ = '9.8'\n")
        (self.dir / "dev/peer_pytorch.py").write_text("import sys\n" + peer + "\n")

    def bench(self, *flags):
        environment = {**os.environ, "PATH": f"{self.dir}/bin:{os.environ['PATH']}", "PYTHONPATH": str(self.dir / "lib")}
        return subprocess.run(["scripts/bench.sh", *flags], cwd=self.dir, env=environment, capture_output=True, text=True, timeout=100)

    def rows(self, name="bench"):
        return re.findall(r"^\| \d.*", (self.dir / f"dev/results/{name}.md").read_text(), re.M)

    def test_table(self):
        done = self.bench("--rows", "d12:64,d48:16", "--name", "b")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.rows("b"), ["| 124M B=64 | 200.0k | 160.0k | 1.25 | 543.9k |",
                                          "| 1558M B=16 | 200.0k | 160.0k | 1.25 | 48.0k (GELU recomputed) |"])
        text = (self.dir / "dev/results/b.md").read_text()
        for word in ("Some GPU", "driver 580.1", "PyTorch 9.8", "scripts/bench.sh --rows d12:64,d48:16 --name b", "peers.md"):
            self.assertIn(word, text)

    def test_a_peer_that_takes_too_long_is_compiled_by_blocks(self):
        self.torch("import time\n'blocks' in sys.argv or time.sleep(100)\nprint('{\"tokens_per_s\": 100000.0}')")
        done = self.bench("--rows", "d24:16", "--limit", "12")  # enough for the others on a busy machine
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.rows(), ["| 350M B=16 | 200.0k | 100.0k (a block compiled at a time) | 2.00 | 194.9k |"])

    def test_what_fails_is_named_and_the_rest_stays(self):
        self.torch("sys.exit('out of memory')")
        done = self.bench("--rows", "d12:4")
        self.assertEqual(done.returncode, 1)
        self.assertIn("without a figure: PyTorch:d12:4", done.stderr)
        self.assertEqual(self.rows(), ["| 124M B=4 | 200.0k |  |  | 371.9k |"])
        self.assertIn("out of memory", (self.dir / "dev/results/bench.log").read_text())

    def test_dry_run_and_refusals(self):
        shutil.rmtree(self.dir / "bin")
        done = self.bench("--dry_run", "--quick", "--rows", "d36:8")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"train_gpt .*--steps 14 --model d36 --batch 8\n.*peer_pytorch.py .*--model d36 --batch 8\n$")
        self.assertFalse((self.dir / "build").exists() or (self.dir / "dev/results/bench.log").exists())
        for flags in (["--rows", "d12"], ["--rows", "d13:4"], ["--limit", "x"], ["--rows"], ["--other"]):
            done = self.bench(*flags)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1), done.stderr)


TRAINER = '''#!/usr/bin/env python3
import json, os, sys
flag = lambda name, default: ([sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word == "--" + name] or [default])[-1]
model, optimizer, gpus, batch = flag("model", "d12"), flag("optimizer", "adamw"), int(flag("gpus", 1)), int(flag("batch", 1))
if "--print_plan" in sys.argv:
    print("predicted for a test: %.3f ms an optimizer step: of which" % (4 / int(flag("ranks", 1))))
    sys.exit(0)
total = int(flag("total_batch", batch * 1024 * gpus))
micro_steps = total // (batch * 1024 * gpus)
print("| step         | %d tokens: %d sequences x 1024 tokens x %d ranks x %d micro-steps" % (total, batch, gpus, micro_steps))
print("| optimizer    | %s, steps 1 to 9" % optimizer)
print("| flags        | --model %s --optimizer %s" % (model, optimizer))
ms, optimizer_ms = (100, 2) if optimizer == "adamw" else (110, 5)
log = []
for step in range(1, 1 + int(flag("steps", 9))):
    slow = 900 if step < 7 else 0
    print("step %5d/9 | loss 10.5 | norm 1.0 | lr 1e-4 | %.2f ms (optimizer %.2f) | %d tok/s | MFU 1%% | 0m01s left | reduce 0.25 | "
          "clip 0.1 | gather 0.05 | wait 0.10" % (step, ms + slow, optimizer_ms, total / ms * 1000))
    log.append(json.dumps({"step": step, "loss": 10.5 + float(os.environ.get("DRIFT", 0)) * (gpus - 1)}))
if flag("out", ""):
    os.makedirs(flag("out", ""), exist_ok=True)
    open(flag("out", "") + "/log.jsonl", "w").write("\\n".join(log) + "\\n")
    open(flag("out", "") + "/trace.json", "w").write("{}")
'''


class Many(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.dir = Path(temporary.name)
        for path in ("scripts/gpu_check.sh", "scripts/random_tokens.py", "scripts/scaling.py"):
            (self.dir / path).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / path, self.dir / path)
        bash = "#!/bin/bash\n"
        for path, text in (("train_gpt", TRAINER), ("build/bench_optimizer", bash + "echo bench $*, nvls $NCCL_NVLS_ENABLE\n"),
                           ("bin/make", bash + "true\n"), ("test/test_ranks.py", "import sys\nprint('ranks', *sys.argv[1:])\n"),
                           ("bin/nvidia-smi", bash + "if [[ $1 == -L ]]; then echo GPU 0; echo GPU 1; else echo Some GPU; fi\n")):
            (self.dir / path).parent.mkdir(exist_ok=True)
            (self.dir / path).write_text(text)
            (self.dir / path).chmod(0o755)

    def many(self, *flags, **more):
        environment = {**os.environ, "PATH": f"{self.dir}/bin:{os.environ['PATH']}", **more}
        return subprocess.run(["scripts/gpu_check.sh", "many", *flags], cwd=self.dir, env=environment, capture_output=True, text=True, timeout=100)

    def test_table(self):
        done = self.many("--name", "m")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        log = (self.dir / "dev/results/m.log").read_text()
        self.assertEqual(log, done.stdout)
        for row in ("| d12 B=64 | 65,536 | 1 | adamw | 100.00 | 655,360 |  |  | 2.00 |  | 4.00 | +100% |",
                    "| d12 B=64 | 131,072 | 2 | adamw | 100.00 | 1,310,720 |  | 2.00x | 2.00 | 0.40 | 2.00 | +0% |",
                    "| d12 B=64 | 131,072 | 2 | dmuon | 110.00 | 1,191,563 | +10.0% | 2.00x | 5.00 | 0.40 | 2.00 | -60% |",
                    "| d12 B=64 | 524,288 | 2 | dmuon | 110.00 | 4,766,254 | +10.0% |  | 5.00 | 0.40 | 2.00 | -60% |"):
            self.assertIn(row, log)
        self.assertIn("bench --gpus 2 --seconds 0.3 --json build/gpu_check_many/bench.jsonl, nvls 0", log)
        self.assertIn("ranks ./train_gpt cuda delays_change_no_bit", log)
        self.assertIn("largest difference over 100 steps 0.000000", log)
        self.assertTrue((self.dir / "dev/results/m_trace.json").exists())

    def test_losses_that_drift_apart_fail(self):
        done = self.many(DRIFT="0.002")
        self.assertEqual(done.returncode, 1)
        self.assertIn("failed: losses of", done.stdout)
        self.assertIn("| d12 B=64 | 131,072 | 2 | dmuon | 110.00 |", done.stdout)  # the rest has run

    def test_what_there_is_no_time_for_is_said(self):
        done = self.many("--budget", "16")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stdout.count("left out, no time is left"), 12, done.stdout)

    def test_dry_run(self):
        shutil.rmtree(self.dir / "bin")
        done = self.many("--dry_run", "--gpus", "8")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(re.findall("^d12, B=64, [1248] GPUs, (?:adamw|dmuon): timeout 40 ", done.stdout, re.M)), 8)
        self.assertFalse((self.dir / "dev").exists())
        for flags in (["--budget", "x"], ["--gpus", "0"], ["--dry_run"], ["--gpus"]):
            done = self.many(*flags)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (2, "", 1), done.stderr)


class PrecisionGap(unittest.TestCase):
    """dev/precision_gap.py with programs whose losses are known."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.dir = Path(temporary.name)
        (self.dir / "dev").mkdir()
        shutil.copy(ROOT / "dev/precision_gap.py", self.dir / "dev")
        common = """
import json, pathlib, sys
def flag(name): return sys.argv[sys.argv.index(name) + 1]
seed = int(flag("--seed"))
"""
        (self.dir / "dev/peer_pytorch.py").write_text(common + """
if flag("--stream") == "bf16_backward" and seed == 2: sys.exit("out of memory")
loss = {"fp32": 4.0, "bf16_forward": 4.1, "bf16_backward": 4.2, "bf16": 4.3}[flag("--stream")] + 0.01 * seed
print(json.dumps({"val_loss": loss}))
""")
        (self.dir / "train_gpt").write_text("#!" + sys.executable + common + """
out = pathlib.Path(flag("--out"))
out.mkdir(parents=True)
(out / "step_00000001.safetensors").write_text("x")
(out / "log.jsonl").write_text('{"step": 1}\\n' + json.dumps({"step": 2, "val_loss": 5.0}) + "\\n")
""")
        (self.dir / "train_gpt").chmod(0o755)

    def gap(self, *flags):
        return subprocess.run([sys.executable, self.dir / "dev/precision_gap.py", "--data", self.dir, "--out", self.dir / "gap.md", *flags],
                              capture_output=True, text=True, timeout=100)

    def test_table(self):
        done = self.gap("--seeds", "1,3")
        self.assertEqual(done.returncode, 0, done.stderr)
        text = (self.dir / "gap.md").read_text()
        self.assertIn("(bf16 parameters, stream and gradient) | 5.0000 | 5.0000 | 5.0000 | +0.9800 ± 0.0100 |", text)
        self.assertIn("its gradient in fp32 | 4.0100 | 4.0300 | 4.0200 |  |", text)
        self.assertIn("both rounded | 4.3100 | 4.3300 | 4.3200 | +0.3000 ± 0.0141 |", text)  # 0.01 sqrt(2)
        self.assertFalse(list(self.dir.glob("build/**/*.safetensors")))

    def test_some_rows(self):
        done = self.gap("--seeds", "1", "--rows", "ours,fp32")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("\n| "), 2 + 1)
        self.assertIn("no bf17 among ours, fp32", self.gap("--rows", "bf17").stderr)

    def test_what_fails_or_has_no_time_stays_empty(self):
        done = self.gap("--seeds", "2")
        self.assertEqual((done.returncode, "not all runs ended" in done.stderr), (1, True), done.stderr)
        self.assertIn("its gradient rounded to bf16 |  |  |  |", (self.dir / "gap.md").read_text())
        done = self.gap("--seeds", "1", "--minutes", "0")
        self.assertEqual(done.returncode, 1)
        self.assertIn("in fp32 |  |  |  |", done.stdout)


if __name__ == "__main__":
    result = unittest.TextTestRunner(verbosity=2).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]))
    bad = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - bad - len(result.skipped)} passed, {bad} failed, {len(result.skipped)} skipped")
    sys.exit(bad > 0)
