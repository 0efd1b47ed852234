#!/usr/bin/env python3
"""Tests of scripts/reproduce.sh and scripts/proof.py: the whole plan with a tiny model, killed and stopped on its way, and the
table's arithmetic on curves that are known; and of scripts/singular_values.py.

    python3 test/test_proof.py      in a directory with ./train_gpt
"""
import contextlib
import importlib.util
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import proof  # noqa: E402 (scripts/proof.py)
import singular_values  # noqa: E402 (scripts/singular_values.py)

TINY = ("--device cpu --layers 1 --heads 2 --channels 32 --seq_len 32 --batch 8 --total_batch 256 --warmup 4 --eval_every 10 "
        "--eval_tokens 512 --save_every 20")


class Plan(unittest.TestCase):
    """With train_gpt, on the CPU."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.dir = Path(cls.temporary.name)
        (cls.dir / "text.txt").write_bytes(b"".join((ROOT / name).read_bytes() for name in
                                                    ("train_gpt.cu", "dmuon.cuh", "cpu_backend.h", "test/test_host.cpp") * 3))
        cls.data = cls.dir / "data"
        subprocess.run([sys.executable, ROOT / "scripts/data.py", f"text:{cls.dir}/text.txt", "--out", cls.data], check=True,
                       capture_output=True)

    def start(self, out, *arguments, steps=60, size=TINY):
        return subprocess.Popen([ROOT / "scripts/reproduce.sh", "--data", self.data, "--out", out, "--size", f"{size} --steps {steps}",
                                 *arguments], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    def run_plan(self, code, out, *arguments, **kwargs):
        with self.start(out, *arguments, **kwargs) as script:
            output, _ = script.communicate(timeout=300)
        self.assertEqual(script.returncode, code, output[-3000:])
        return output

    @staticmethod
    def losses(out):
        """Of every run all that its log says about training, without the times."""
        return {log.parent.name: [{key: value for key, value in json.loads(line).items() if key in ("step", "loss", "val_loss", "tokens")}
                                  for line in log.read_text().splitlines()] for log in out.glob("*/log.jsonl")}

    @staticmethod
    def table(output):
        """Its rows; the columns of seconds and milliseconds are left out."""
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line.startswith("|")]
        return [row[:7] + row[8:9] if len(row) == 12 else row for row in rows]

    def assert_plan(self, losses):
        """Four rates each and what lies beyond, until the best has neighbours on both sides or two were added; then six more runs."""
        of_optimizer = {name: {} for name in ("adamw", "dmuon")}
        for run, log in losses.items():
            optimizer, rate, seed = re.fullmatch(r"(\w+)_(.*)_seed(\d+)", run).groups()
            if seed == "1337" and optimizer in of_optimizer:
                of_optimizer[optimizer][float(rate)] = [line["val_loss"] for line in log if "val_loss" in line][-1]
        for rates in of_optimizer.values():
            best = min(rates, key=rates.get)
            if best in (min(rates), max(rates)):
                self.assertEqual(len(rates), 6)
            else:
                self.assertIn(len(rates), (4, 5, 6))
        self.assertEqual(len(losses), sum(map(len, of_optimizer.values())) + 6)

    def test_a_plan_that_is_stopped_again_and_again_ends_with_the_same_table(self):
        whole = self.dir / "whole"
        expected = self.run_plan(0, whole, steps=400)
        self.assert_plan(self.losses(whole))
        self.assertEqual(list(whole.glob("*/step_*")), [])

        broken = self.dir / "broken"
        for at, (name, number) in enumerate((("adamw_1.2e-3_seed1337", signal.SIGKILL), ("dmuon_2.4e-3_seed1337", signal.SIGTERM),
                                             ("adamw_1.8e-3_seed1337", signal.SIGINT))):
            with self.start(broken, steps=400) as script:
                log = broken / name / "log.jsonl"
                while script.poll() is None and (not log.exists() or log.read_text().count("\n") < 20):
                    time.sleep(0.005)
                if number == signal.SIGKILL:
                    os.killpg(script.pid, number)
                else:
                    script.send_signal(number)
                output, _ = script.communicate(timeout=60)
            self.assertEqual(script.returncode, -9 if number == signal.SIGKILL else 130, output[-2000:])
            self.assertLess(log.read_text().count("\n"), 400)
            if at:  # it was told, and has saved
                self.assertIn("by signal 15", output)
        time_is_up = self.run_plan(3, broken, "--minutes", "0.034", steps=400)  # 2 s: not for all
        self.assertIn("the same command goes on", time_is_up)
        output = self.run_plan(0, broken, steps=400)
        self.assertEqual(self.losses(broken), self.losses(whole))
        self.assertEqual(self.table(output), self.table(expected))
        self.assertEqual((broken / "table.md").read_text(), output[output.index("machine: "):])

        # What is finished is not done again, and what differs is not mixed in.
        before = {path: path.stat().st_mtime_ns for path in broken.glob("*/log.jsonl")}
        self.run_plan(0, broken, steps=400)
        self.assertEqual({path: path.stat().st_mtime_ns for path in broken.glob("*/log.jsonl")}, before)
        self.assertIn("choose another --out", self.run_plan(1, broken, steps=100))

    def test_time_that_is_up_within_a_run(self):
        # 6 s: enough to begin on a busy machine, and a fifth of what an idle one needs for the 2000 steps of this larger model.
        larger = {"steps": 2000, "size": TINY.replace("--layers 1", "--layers 6").replace("--channels 32", "--channels 128")}
        output = self.run_plan(3, self.dir / "one", "--minutes", "0.1", **larger)
        self.assertIn("by signal 10", output)
        self.assertIn("time is up; the same command goes on", output)
        self.assertTrue(list((self.dir / "one").glob("*/step_*")))
        self.assertNotIn("starting from step 1", self.run_plan(3, self.dir / "one", "--minutes", "0.05", **larger))

    def test_ablations(self):
        output = self.run_plan(0, self.dir / "ablations", "--ablate", steps=10)
        rows = self.table(output)
        self.assertEqual(rows[0][:3], ["variant", "final loss, seed 1337", "final loss, seed 1338"])
        self.assertEqual((len(rows), rows[2][0], rows[2][4]), (16, "base", "+0.0000"))

    def test_what_cannot_be_done_is_said(self):
        self.assertIn("needs 61440000 distinct", self.run_plan(1, self.dir / "few", steps=240000))
        self.assertIn("has no train_*.bin", self.run_plan(1, self.dir / "few", "--data", "/nowhere"))
        self.assertIn("'--fast' is no flag", self.run_plan(2, self.dir / "few", "--fast"))
        self.assertIn("--minutes soon: a number", self.run_plan(2, self.dir / "few", "--minutes", "soon"))
        self.assertIn("ended with exit status 2: ", self.run_plan(1, self.dir / "bad", "--size", f"{TINY} --steps 5 --layers 0"))

    def test_a_rate_that_is_too_high(self):
        out = self.dir / "diverged"
        (out / "adamw_1.2e-3_seed1337").mkdir(parents=True)
        (out / "adamw_1.2e-3_seed1337" / "diverged").touch()
        self.assertIn("1.2e-3: diverged", self.table(self.run_plan(0, out, steps=10))[2][1])
        # By these words of the trainer the script knows such a run.
        words = re.search("grep -q '(had a loss [^']*)'", (ROOT / "scripts/reproduce.sh").read_text())[1]
        self.assertIn(f"10 steps in a row {words}", (ROOT / "train_gpt.cu").read_text())


class Table(unittest.TestCase):
    """Curves that are straight lines, so that what the table must say can be worked out by hand."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir = Path(self.temporary.name)

    def run_of(self, name, final, step_ms, steps=100, **changes):
        """Validation loss from 7 to `final` in a straight line, every tenth step."""
        (self.dir / name).mkdir()
        lines = [{"step": i, "loss": 9, "step_ms": step_ms, "optimizer_ms": step_ms / 10, "tokens_per_s": 1e3, "tokens": i * 1e5,
                  **({"val_loss": 7 + (final - 7) * i / 100} if i % 10 == 0 else {}), **changes} for i in range(1, steps + 1)]
        (self.dir / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def proof(self, *arguments, code=0):
        stdout, stderr, ended = io.StringIO(), io.StringIO(), 0
        with mock.patch.object(sys, "argv", ["proof.py", str(self.dir), *arguments]), contextlib.redirect_stdout(stdout), \
                contextlib.redirect_stderr(stderr):
            try:
                proof.main()
            except SystemExit as e:
                ended = 1
                stderr.write(str(e.code))
        self.assertEqual(ended, code, stderr.getvalue())
        return stdout.getvalue(), stderr.getvalue()

    def cells(self, output, optimizer):
        return [cell.strip() for cell in [line for line in output.splitlines() if line.startswith(f"| {optimizer} |")][-1].split("|")[1:-1]]

    def test_steps_tokens_and_seconds(self):
        self.run_of("adamw_1e-3_seed1337", 4.0, 20)
        self.run_of("adamw_2e-3_seed1337", 3.1, 20)
        self.run_of("adamw_2e-3_seed1338", 2.9, 20)  # tuned AdamW: 3.0, spread 0.2, 2 s
        self.run_of("adamw_3e-3_seed1337", 3.2, 20)
        self.run_of("dmuon_2e-3_seed1337", -1.0, 24)  # 8 nats in 100 steps: 4 in 50
        self.run_of("dmuon_2e-3_seed1338", 1.0, 24)  # 6 in 100: 4 in 66.7
        self.run_of("dmuon_9e-3_seed1337", 2.0, 24)
        self.run_of("hierarchical_2e-3_seed1337", 3.5, 22)  # never there
        (self.dir / "dmuon_8e-3_seed1337").mkdir()
        (self.dir / "dmuon_8e-3_seed1337" / "diverged").touch()
        self.run_of("dmuon_7e-3_seed1337", -5.0, 24, steps=40)  # not at its end: is not the best
        output, errors = self.proof()
        self.assertIn("left out dmuon_7e-3_seed1337, which is at step 40 of 100", errors)
        self.assertIn("Tuned AdamW ends at 3.0000 after 100 steps, 10.0 M tokens and 2.0 s", output)
        self.assertEqual(self.cells(output, "adamw"), ["adamw", "2e-3", "2", "3.0000", "0.2000", "100", "10.0", "2.0", "1.000", "1.000",
                                                       "20.00", "2.00"])
        self.assertEqual(self.cells(output, "dmuon"), ["dmuon", "2e-3", "2", "0.0000", "2.0000", "58", "5.8", "1.4", "0.583", "0.700",
                                                       "24.00", "2.40"])
        self.assertIn("not reached by 1 of 1", output)
        self.assertRegex(output, r"dmuon \| 2e-3: -1.0000, 8e-3: diverged, 9e-3: 2.0000 \(the best is at the end of the sweep")
        self.assertNotRegex(output, r"adamw \| .*end of the sweep")
        self.assertEqual(self.proof("--best", "adamw")[0], "2e-3\n")
        self.assertEqual(self.proof("--best", "dmuon")[0], "2e-3\n")
        self.assertEqual(self.proof("--beyond", "adamw")[0], "\n")
        self.assertEqual(self.proof("--beyond", "dmuon")[0], "1.3e-3\n")
        self.run_of("adamw_4.8e-3_seed1337", 2.5, 20)
        self.assertEqual(self.proof("--beyond", "adamw")[0], "7.2e-3\n")

    def test_without_runs(self):
        self.assertIn("no run of adamw", self.proof(code=1)[1])
        self.assertIn("no run of muon", self.proof("--best", "muon", code=1)[1])
        self.assertIn("no run of base", self.proof("--ablations", code=1)[1])

    def test_ablations(self):
        for name, first, second in (("base", 3.0, 3.2), ("x", 3.5, 3.3), ("half", 3.0, None)):
            self.run_of(f"{name}_seed1337", first, 10)
            if second:
                self.run_of(f"{name}_seed1338", second, 10)
        output, _ = self.proof("--ablations")
        self.assertEqual(self.cells(output, "x"), ["x", "3.5000", "3.3000", "3.4000", "+0.3000", "1.00"])
        self.assertEqual(self.cells(output, "half"), ["half", "3.0000", "", "", "", "1.00"])
        self.assertTrue(re.search(r"base .*\n.*half .*\n.*x ", output))


@unittest.skipUnless(importlib.util.find_spec("numpy") and importlib.util.find_spec("safetensors"), "no numpy and safetensors")
class SingularValues(unittest.TestCase):
    """scripts/singular_values.py on matrices made from known singular values: the polynomials, applied to these numbers one by
    one, are the truth for the iteration on the matrices."""

    def test_before_and_after(self):
        import numpy as np
        rng = np.random.default_rng()
        C = 40
        shapes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        true, tensors = {}, {}

        def matrix(name, m, n):
            values = np.sort(10 ** rng.uniform(-3, 1, C))[::-1]
            u, v = (np.linalg.qr(rng.normal(size=(size, C)))[0] for size in (m, n))
            true[name] = values / np.linalg.norm(values)
            return (u * values) @ v.T
        tensors["attn.c_attn"] = np.concatenate([matrix(name, C, C) for name in "QKV"])
        for name, letter in (("attn.c_proj", "O"), ("mlp.c_fc", "F"), ("mlp.c_proj", "P")):
            tensors[name] = matrix(letter, *shapes[name])

        header, at, content = {"__metadata__": {"format": "train_gpt"}}, 0, b""
        for name, values in tensors.items():
            raw = values.astype("<f4").tobytes()
            header[f"optimizer.momentum.h.1.{name}.weight"] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [at, at + len(raw)]}
            content, at = content + raw, at + len(raw)
        text = json.dumps(header).encode()
        with tempfile.TemporaryDirectory() as tmp:
            path = Path(tmp, "x.safetensors")
            path.write_bytes(struct.pack("<Q", len(text)) + text + content)
            found = singular_values.layer_matrices(path, 1)
            with self.assertRaisesRegex(SystemExit, "has no optimizer.momentum.h.7"):
                singular_values.layer_matrices(path, 7)
            path.write_bytes(path.read_bytes()[:100])
            with self.assertRaisesRegex(SystemExit, "x.safetensors: "):
                singular_values.layer_matrices(path, 1)
        for coefficients, number, last in (("polar_express", 5, 0.4188073119525673 / 1.05**5), ("you", 5, 1.2012), ("keller", 1, 2.0315)):
            polynomials = singular_values.coefficients(coefficients)
            self.assertEqual((len(polynomials), polynomials[-1][2]), (number, last))
            for name, (before, after, along) in singular_values.spectra(found, polynomials, 5).items():
                s = true[name]
                np.testing.assert_allclose(before, s, atol=1e-6)  # fp32 matrices of norm 1
                for k in range(5):
                    a, b, c = polynomials[min(k, number - 1)]
                    s = a * s + b * s**3 + c * s**5
                # Their errors grow by the product of the a: up to 500 times the 6e-8 of fp32.
                np.testing.assert_allclose(after, np.sort(s)[::-1], atol=1e-3)
                np.testing.assert_allclose(along, s, atol=1e-3)


if __name__ == "__main__":
    result = unittest.TextTestRunner(verbosity=2).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]))
    bad = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - bad - len(result.skipped)} passed, {bad} failed, {len(result.skipped)} skipped")
    sys.exit(bad > 0)
