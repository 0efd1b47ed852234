#!/usr/bin/env python3
"""Runs that are killed again and again, and resumed each time, end with the bits of a run that was left alone.

    python3 test/soak.py TRAIN_GPT [--kills N] [--seed N] [--minutes N] [--device cuda]
                                                without --kills and --minutes: as many as fit in about 20 s

CPU runs on 1 and on 3 ranks. Each story is one run: started with --resume auto, killed (SIGKILL to a rank or to mpirun, at a
random moment or as soon as a save is under way) or asked to stop (SIGTERM and its like), some times over, then left to
finish. Its last checkpoint must be that of the uninterrupted run byte for byte, and its log too, but for the times in it.
Then runs on 4 ranks are killed and go on with 1, 2, 3 and 5. Ends with `N passed, N failed, N skipped`. With --device cuda one
rank, and as many as there are GPUs, by --gpus.

A kill is counted if it ended a run that did not have its last checkpoint yet: the exit code says so. It was inside a save if
one that this very run had begun was under way, and stayed unfinished. Requests to stop are counted likewise.
"""
import argparse
import collections
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STEPS, SEQUENCES = 120, 12  # sequences per step: 1, 2, 3, 4 ranks divide them
KILLS_PER_STORY = 5
# Another number of ranks adds the same fp32 gradients in another order: 1e-7 of a value, which the steps after it may grow.
# Seen in twelve runs: 1e-8 to 8e-8 of a loss.
TOLERANCE = 2e-6
# Open MPI 4.1.4 on PMIx 4.2.2: once in 340 runs that were ended early mpirun stayed when its last rank was gone, its main thread
# in PMIx_server_finalize, which waits for a thread that waits for a lock (seen in a debugger). Such an mpirun is ended, and counted.
ALONE = 10  # seconds that mpirun may stay without a rank


class Failed(Exception):
    pass


def flags(optimizer, out):
    return [*map(str, [PROGRAM, "--device", DEVICE, "--train", DATA / "train_*.bin", "--val", DATA / "val_*.bin", "--layers", 2,
                       "--heads", 2, "--channels", 64, "--seq_len", 32, "--batch", 1, "--total_batch", SEQUENCES * 32, "--steps",
                       STEPS, "--optimizer", optimizer, "--lr", 0.003, "--eval_every", 25, "--save_every", 4,
                       "--rank_timeout", 20, "--out", out, "--resume", "auto"])]


def command(ranks, arguments):
    if ranks == 1:
        return arguments
    if DEVICE == "cuda":
        return [*arguments, "--gpus", str(ranks)]
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), *arguments]


def unfinished(out):
    """The temporary files of saves, (name, inode) -> time of the last write: a save is under way, or was cut short."""
    found = {}
    for name in os.listdir(out) if out.exists() else []:
        if name.endswith(".safetensors.tmp"):
            try:
                about = os.stat(out / name)
                found[name, about.st_ino] = about.st_mtime_ns
            except FileNotFoundError:
                pass  # it is finished
    return found


def stat_of(pid):
    """(command, state, session) of a process; None if there is none."""
    try:
        name, fields = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
        return name, fields.split()[0], int(fields.split()[3])
    except (OSError, ValueError, IndexError):
        return None


def in_session(session):
    """pid -> command of the processes of a session that have not ended."""
    stats = {int(pid): stat_of(pid) for pid in os.listdir("/proc") if pid.isdecimal()}
    return {pid: stat[0] for pid, stat in stats.items() if stat and stat[1] not in "ZX" and stat[2] == session}


class Process:
    """A run under way, in a session of its own: nothing of it is left when the block is left.

    A run that fails though it was sent no signal is an error."""

    mpirun_stayed = 0  # how often, without a rank

    def __init__(self, ranks, arguments, last):
        self.last = last  # the checkpoint that it ends with
        self.before = unfinished(last.parent)  # what another run left: this one's saves are told from it
        self.sent = None  # (pid, signal)
        self.said = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(command(ranks, arguments), stdout=self.said, stderr=self.said, env=ENV, start_new_session=True,
                                        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in STOPS])

    def __enter__(self):
        return self

    def ranks(self):
        return [pid for pid, name in in_session(self.process.pid).items() if name == PROGRAM.name[:15]]

    def saves(self):
        """The saves that this run has begun and not finished."""
        return {file for file, written in unfinished(self.last.parent).items() if self.before.get(file) != written}

    def send(self, pid, number):
        """To a process of this run, if it has not ended."""
        self.under_way, stat = self.saves(), stat_of(pid)
        if self.process.poll() is None and stat and stat[1] not in "ZX":
            self.sent = pid, number
            os.kill(pid, number)

    def cut_short(self):
        """Whether the signal has ended it before its last checkpoint."""
        if not self.sent or self.last.exists():
            return False
        pid, number = self.sent
        own = pid == self.process.pid  # else mpirun, or the parent of the ranks, tells how a rank has ended
        return self.process.returncode in ((-number, 128 + number) if own else (128 + number,))

    def in_save(self):
        """Whether it has left a save unfinished that was under way when the signal came."""
        return bool(self.under_way & self.saves())

    def output(self):
        self.said.seek(0)
        return "".join(line for line in self.said if not line.startswith(("step ", "| ")))[-3000:]

    def __exit__(self, error, *_):
        end, alone = time.time() + 40, None  # since when mpirun is
        while (left := in_session(self.process.pid)) and time.time() < end:
            self.process.poll()
            alone = (alone or time.time()) if left == {self.process.pid: "mpirun"} else None
            if alone and time.time() > alone + ALONE:
                Process.mpirun_stayed += 1
                break
            time.sleep(0.005)
        left = in_session(self.process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        code = self.process.wait()
        if left == {self.process.pid: "mpirun"}:
            left, code = {}, 0
        said = self.output()
        self.said.close()
        if left:
            raise Failed(f"40 s after it was ended there are left: {left}\n{said}")
        if code != 0 and not self.sent and not error:
            raise Failed(f"exit code {code}:\n{said}")


def finish(ranks, arguments, last):
    with Process(ranks, arguments, last) as run:
        try:
            run.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            for pid in in_session(run.process.pid):
                os.kill(pid, signal.SIGKILL)
            raise Failed(f"it does not end:\n{run.output()}") from None


def log_of(out):
    """What the log says about training, without the times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_ms") and key not in ("tokens_per_s", "mfu")}
            for line in lines]


def checkpoint(out, step=STEPS):
    return out / f"step_{step:08}.safetensors"


def count_gpus():
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


class Soak:
    def __init__(self, chance):
        self.chance = chance
        self.kills = collections.Counter()  # by the number of ranks
        self.in_saves = self.stops = 0
        self.worst = 0  # relative difference of a loss after a resume on another number of ranks
        self.whole = {}  # (optimizer, ranks) -> directory of the uninterrupted run, seconds that it took

    def uninterrupted(self, optimizer, ranks):
        if (optimizer, ranks) not in self.whole:
            out, begin = WORK / f"whole_{optimizer}_{ranks}", time.time()
            finish(ranks, flags(optimizer, out), checkpoint(out))
            self.whole[optimizer, ranks] = out, time.time() - begin
        return self.whole[optimizer, ranks]

    def interrupt(self, ranks, arguments, out, seconds):
        """One start and its end: what was done to it."""
        how = self.chance.choice(("kill", "kill in a save", "kill in a save", "stop"))
        number = self.chance.choice(STOPS) if how == "stop" else signal.SIGKILL
        with Process(ranks, arguments, checkpoint(out)) as run:
            moment = time.time() + self.chance.uniform(0, seconds)
            while len(victims := run.ranks()) < ranks and run.process.poll() is None and time.time() < moment:
                time.sleep(0.005)
            if ranks > 1 and how != "stop" and self.chance.random() < 0.3:
                victims = []
            victim = self.chance.choice(victims or [run.process.pid])  # the process that we started: mpirun, or the run itself
            if how == "kill in a save":
                pause, end = self.chance.choice((0, 0, 0.0003, 0.001)), time.time() + seconds
                while time.time() < end and run.process.poll() is None and not run.saves():
                    pass  # a save takes a few milliseconds
                time.sleep(pause)
            else:
                time.sleep(max(0, moment - time.time()))
            run.send(victim, number)
        ended = run.cut_short()
        self.stops += ended and how == "stop"
        self.kills[ranks] += ended and how != "stop"
        self.in_saves += ended and how != "stop" and run.in_save()
        return f"{how} ({number.name})"

    def story(self, optimizer, ranks, until):
        whole, seconds = self.uninterrupted(optimizer, ranks)
        out = WORK / "story"
        shutil.rmtree(out, ignore_errors=True)
        told = []
        while len(told) < KILLS_PER_STORY and (not told or time.time() < until) and not checkpoint(out).exists():
            told.append(self.interrupt(ranks, flags(optimizer, out), out, 0.7 * seconds))
        finish(ranks, flags(optimizer, out), checkpoint(out))
        for what, read in (("log", log_of), ("last checkpoint", lambda run: checkpoint(run).read_bytes())):
            if read(out) != read(whole):
                kept = shutil.copytree(out, tempfile.mkdtemp(prefix="soak_") + "/story")
                raise Failed(f"{optimizer} on {ranks} ranks, {', '.join(told)}: another {what} than uninterrupted; see {kept}")

    def other_ranks(self, ranks):
        """Killed on 4 ranks, goes on on another number: the losses of 4, to rounding."""
        steps = 60
        more = ["--total_batch", str(60 * 32), "--ns_dtype", "fp32", "--steps", str(steps)]  # 5 ranks divide that too
        whole, out = WORK / "whole_4", WORK / "elastic"
        if not whole.exists():
            finish(4, flags("dmuon", whole) + more, checkpoint(whole, steps))
        arguments, last = flags("dmuon", out) + more, checkpoint(out, steps)
        killed = False
        while not killed:  # a run that ends before we see its checkpoint is begun again
            shutil.rmtree(out, ignore_errors=True)
            at = self.chance.randrange(4, 40)
            with Process(4, arguments, last) as run:
                while run.process.poll() is None and not any(path > checkpoint(out, at) for path in out.glob("step_*.safetensors")):
                    time.sleep(0.001)
                victims = run.ranks()
                if victims:
                    run.send(self.chance.choice(victims), signal.SIGKILL)
            killed = run.cut_short()
        self.kills[4] += 1
        self.in_saves += run.in_save()
        finish(ranks, arguments, last)
        resumed, undisturbed = ([line["loss"] for line in log_of(run)] for run in (out, whole))
        if len(resumed) != len(undisturbed):
            raise Failed(f"killed on 4 ranks past step {at}, resumed on {ranks}: {len(resumed)} lines of the log, not {len(undisturbed)}")
        worst = max(abs(a - b) / b for a, b in zip(resumed, undisturbed))
        self.worst = max(self.worst, worst)
        if worst > TOLERANCE:
            raise Failed(f"killed on 4 ranks past step {at}, resumed on {ranks}: losses differ by {worst:.1e} of their value")


def main():
    global PROGRAM, WORK, DATA, DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=lambda path: Path(path).resolve())
    parser.add_argument("--kills", type=int, help="at least so many, however long that takes")
    parser.add_argument("--minutes", type=float, help="kills for so long, on one rank and then on several")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments and the signals [a new one]")
    args = parser.parse_args()
    PROGRAM, DEVICE = args.program, args.device
    have_mpi = DEVICE == "cpu" and shutil.which("mpirun") and " mpi" in subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout
    print(f"seed {args.seed}", flush=True)

    with tempfile.TemporaryDirectory(prefix="soak_") as work:
        WORK, DATA = Path(work), Path(work, "data")
        text = b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.h")))
        (WORK / "text.txt").write_bytes(text)
        subprocess.run([sys.executable, ROOT / "scripts" / "data.py", f"text:{WORK}/text.txt", "--out", DATA], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        soak, begin = Soak(random.Random(args.seed)), time.time()
        counts = {"passed": 0, "failed": 0, "skipped": 0}

        def check(name, work):
            start = time.time()
            try:
                work()
                counts["passed"] += 1
                print(f"ok {name} ({time.time() - start:.1f} s)", flush=True)
            except Failed as why:
                counts["failed"] += 1
                print(f"FAIL {name}: {why}", flush=True)

        def stories(ranks, until, share):
            """Until a time, or with --kills until this share of them is done."""
            told = 0
            while told == 0 or (soak.kills[ranks] < args.kills * share if args.kills else time.time() < until):
                soak.story(("adamw", "dmuon")[told % 2], ranks, math.inf if args.kills else until)
                told += 1

        seconds = 60 * args.minutes if args.minutes else 10
        gpus = count_gpus() if DEVICE == "cuda" else 0
        several = gpus if gpus > 1 else 3 if have_mpi else 0
        check("killed on 1 rank", lambda: stories(1, begin + (0.5 if several else 1) * seconds, 0.6 if several else 1))
        if several:
            check(f"killed on {several} ranks", lambda: stories(several, begin + seconds, 0.4))
        if have_mpi:
            for ranks in (1, 2, 3, 5) if args.kills or args.minutes else [soak.chance.choice((1, 2, 3, 5))]:
                check(f"killed on 4 ranks, resumed on {ranks}", lambda: soak.other_ranks(ranks))
        elif not several:
            counts["skipped"] += 2
        if soak.worst:
            print(f"on another number of ranks losses differ by {soak.worst:.1e} of their value at most, allowed is {TOLERANCE:.0e}")
        if Process.mpirun_stayed:
            print(f"mpirun stayed without a rank {Process.mpirun_stayed} times, and was ended after {ALONE} s")
        on_ranks = ", ".join(f"{kills} on {ranks} rank{'s' if ranks > 1 else ''}" for ranks, kills in soak.kills.items())
        print(f"{sum(soak.kills.values())} kills ({on_ranks}), {soak.in_saves} of them inside a save, and {soak.stops} requests to stop "
              f"in {time.time() - begin:.0f} s")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return counts["failed"] > 0


if __name__ == "__main__":
    sys.exit(main())
