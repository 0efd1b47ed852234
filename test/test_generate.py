#!/usr/bin/env python3
"""Text from a trained model: train_gpt --generate and scripts/generate.py, as a user starts them, without a GPU.

    python3 test/test_generate.py ./train_gpt [NAME...]     all tests, or those

Tiny models learn one sentence by heart. GPT-2's tokens are tested with a stand-in for the package tiktoken, and once more with the
package itself where it and its vocabulary are (else that test is skipped).
"""
import importlib.util
import os
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = None
SENTENCE = "Der Bär, naïve 熊, eats 🍯 at noon. "  # characters of one to four bytes; 44 bytes
SEQ_LEN = 64  # longer than the sentence: each token follows from the context

# As many tokens as GPT-2's, of one or two bytes: characters are split between tokens in any way.
STAND_IN = """
class Encoding:
    def encode_ordinary(self, text):
        text, tokens = text.encode(), []
        while text:
            pair = text[0] * 256 + text[1] if len(text) > 1 else 50000
            tokens.append(256 + pair if pair < 50000 else text[0])
            text = text[2 if pair < 50000 else 1:]
        return tokens

    def decode_single_token_bytes(self, token):
        return bytes([token]) if token < 256 else bytes(divmod(token - 256, 256))

def get_encoding(name):
    return Encoding()
"""


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}  # models as small as these gain nothing from a second thread


def train(name, tokenizer, *flags, **changes):
    """A checkpoint that knows SENTENCE by heart."""
    (work / "text.txt").write_bytes(SENTENCE.encode() * 4000)
    subprocess.run([sys.executable, ROOT / "scripts/data.py", f"text:{work}/text.txt", "--tokenizer", tokenizer, "--out", work / name],
                   check=True, capture_output=True, env=environment(**changes))
    subprocess.run([BINARY, "--train", f"{work}/{name}/train_*.bin", "--layers", "2", "--heads", "2", "--channels", "32", "--seq_len",
                    str(SEQ_LEN), "--batch", "4", "--lr", "1e-2", "--warmup", "20", "--device", "cpu", "--out", work / f"{name}_run",
                    *flags], check=True, capture_output=True, env=environment())
    return next((work / f"{name}_run").glob("step_*"))


def setUpModule():
    global temporary, work, checkpoint
    temporary = tempfile.TemporaryDirectory()
    work = Path(temporary.name)
    checkpoint = train("bytes", "byte", "--steps", "300")


def tearDownModule():
    temporary.cleanup()


def tokens(prompt, count, *flags, model=None):
    """train_gpt --generate: the line it begins with, and the tokens."""
    text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    result = subprocess.run([BINARY, "--model", model or checkpoint, "--generate", str(count), "--device", "cpu", *map(str, flags)],
                            input=text, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    return first, [int(line) for line in lines], result.stderr


def script(*arguments, model=None, stdin=b"", env=None):
    return subprocess.run([sys.executable, ROOT / "scripts/generate.py", "--program", BINARY, "--device", "cpu", model or checkpoint,
                           *map(str, arguments)], input=stdin, capture_output=True, env=env or environment())


def expected(prompt, count, text=SENTENCE.encode()):
    """Prompt and its continuation: `count` bytes of the sentence, again and again."""
    begin = (text * 9).index(prompt[-20:]) + len(prompt[-20:])
    return prompt + (text * 99)[begin:begin + count]


class Generate(unittest.TestCase):
    def written(self, result):
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue(result.stdout.endswith(b"\n"))
        return result.stdout[:-1]

    def refused(self, code, words, result):
        said = result.stderr if isinstance(result.stderr, str) else result.stderr.decode()
        self.assertEqual((result.returncode, len(said.splitlines())), (code, 1), said)
        for word in [words] if isinstance(words, str) else words:
            self.assertIn(word, said)

    # ------------------------------------------------------------------------------------------------------------------
    # train_gpt --generate

    def test_it_goes_on_by_heart(self):
        prompt = SENTENCE.encode()[:10]
        first, greedy, said = tokens(list(prompt), 5 * SEQ_LEN, "--temperature", 0)  # past the end of the context, many times
        self.assertEqual(prompt + bytes(greedy), expected(prompt, 5 * SEQ_LEN))
        self.assertRegex(first, f"^tokenizer [0-9a-f]{{16}} vocabulary 256 context {SEQ_LEN}$")
        self.assertRegex(said, f"^10 tokens read in [0-9.]+ s, {5 * SEQ_LEN} written, [0-9.]+ tokens/s after the first\n$")
        # top_k 1 is the same, whatever the temperature.
        self.assertEqual(tokens(list(prompt), 40, "--temperature", 50, "--top_k", 1)[1], greedy[:40])

    def test_seeds(self):
        def text(*flags):
            return tokens([10], 100, "--temperature", 3, *flags)[1]

        one = text("--seed", 1)
        self.assertEqual(text("--seed", 1), one)
        self.assertNotEqual(text("--seed", 2), one)
        self.assertEqual(text(), text("--seed", 1337))
        self.assertEqual(tokens([10], 30, "--temperature", 3, "--seed", 1)[1], one[:30])  # the length changes nothing
        self.assertGreater(len(set(text("--temperature", 100))), len(set(text("--temperature", 100, "--top_k", 2))))

    def test_samples_of_training(self):
        # The sample after the last step is what the checkpoint writes from the end of a text, with seed + step.
        for optimizer in ("adamw", "dmuon"):
            out = work / f"sampled_{optimizer}"
            said = subprocess.run([BINARY, "--train", f"{work}/bytes/train_*.bin", "--layers", "2", "--heads", "2", "--channels", "32",
                                   "--seq_len", "24", "--batch", "4", "--lr", "1e-2", "--steps", "40", "--optimizer", optimizer, "--device",
                                   "cpu", "--out", out, "--sample_every", "20", "--sample_tokens", "100", "--top_k", "9", "--seed", "5"],
                                  check=True, capture_output=True, env=environment()).stdout.decode()
            samples = [text.split("\n---\n")[0] for text in said.split("--- sample at step ")[1:]]
            self.assertEqual([text.split("\n")[0] for text in samples], ["20", "40"])
            model = next(out.glob("step_*"))
            written = bytes(tokens([10], 100, "--top_k", 9, "--seed", 45, model=model)[1])
            self.assertEqual(samples[1].split("\n", 1)[1], written.decode(errors="backslashreplace"))

    def test_long_prompts(self):
        prompt = SENTENCE.encode() * 9
        for length in (SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, 3 * SEQ_LEN + 5):
            _, greedy, said = tokens(list(prompt[:length]), 50, "--temperature", 0)
            self.assertEqual(bytes(greedy), expected(prompt[:length], 50)[length:], length)
            note = f"note: the prompt has {length} tokens and the context room for {SEQ_LEN}: the last {SEQ_LEN} are read\n"
            self.assertEqual(note in said, length > SEQ_LEN, said)

    def test_bad_prompts(self):
        for words, text in (("empty", ""), ("empty", " \n"), ("byte 0x61", "1 a"), ("byte 0x2d", "-1"), ("byte 0x00", "1 \0 2"),
                            (("token 256", "vocabulary of 256"), "255 256")):
            self.refused(1, words, subprocess.run([BINARY, "--model", checkpoint, "--generate", "3", "--device", "cpu"], input=text,
                                                  capture_output=True, text=True, env=environment()))

    def test_bad_flags(self):
        for code, words, flags in ((2, "--model CHECKPOINT", []), (2, "--model CHECKPOINT", ["--model", "d6"]),
                                   (2, ("--steps", "--generate"), ["--model", checkpoint, "--steps", "3"]),
                                   (2, ("--gpus", "--generate"), ["--model", checkpoint, "--gpus", "2"]),
                                   (1, "not a checkpoint", ["--model", work / "text.txt"])):
            self.refused(code, words, subprocess.run([BINARY, "--generate", "3", *flags], input="1", capture_output=True, text=True,
                                                     env=environment()))
        several = environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0")
        self.refused(2, "one process", subprocess.run([BINARY, "--generate", "3", "--model", checkpoint], input="1", text=True,
                                                      capture_output=True, env=several))

    def test_damaged_checkpoint(self):
        content = bytearray(checkpoint.read_bytes())
        for i in range(16):  # wherever the weights are in it
            content[len(content) * (2 * i + 1) // 32] ^= 1
        damaged = work / checkpoint.name
        damaged.write_bytes(content)
        result = script("x", model=damaged)
        self.refused(1, str(damaged), result)

    # ------------------------------------------------------------------------------------------------------------------
    # scripts/generate.py

    def test_text(self):
        result = script(SENTENCE[:12], "--temperature", 0, "--tokens", 200)
        self.assertEqual(self.written(result), expected(SENTENCE[:12].encode(), 200).decode(errors="backslashreplace").encode())
        self.assertIn(b"tokens/s after the first\n", result.stderr)
        self.assertEqual(script(SENTENCE[:12], "--temperature", 0, "--tokens", 200).stdout, result.stdout)
        self.assertNotEqual(*(self.written(script("x", "--temperature", 2, "--seed", seed)) for seed in (1, 2)))

    def test_no_prompt_begins_like_a_document(self):
        self.assertEqual(self.written(script("--temperature", 0, "--tokens", 40)), bytes(tokens([10], 40, "--temperature", 0)[1]))
        self.assertEqual(script("", "--temperature", 0, "--tokens", 40).stdout, script("--temperature", 0, "--tokens", 40).stdout)

    def test_odd_bytes(self):
        # A character cut in two by the end of the prompt is put together again.
        cut = SENTENCE.encode().index("🍯".encode()) + 2
        prompt = SENTENCE.encode()[:cut]
        self.assertEqual(self.written(script("-", "--temperature", 0, "--tokens", 20, stdin=prompt)), expected(prompt, 20))
        self.assertEqual(self.written(script(os.fsdecode(prompt), "--temperature", 0, "--tokens", 20)), expected(prompt, 20))
        odd = b"\0\x1b[2J\xff\r\xc2\x9b\x7f\t\n" + prompt
        shown = self.written(script("-", "--temperature", 0, "--tokens", 20, stdin=odd))
        self.assertTrue(shown.startswith(rb"\x00\x1b[2J\xff\x0d\xc2\x9b\x7f" + b"\t\n" + expected(prompt, 2)), shown)
        # A model that knows nothing writes any byte: all of them are there, none steers the terminal.
        wild = self.written(script("x", "--temperature", 100, "--tokens", 500)).decode()
        self.assertIn("\\x", wild)
        self.assertFalse([c for c in wild if ord(c) < 9 or 10 < ord(c) < 32 or 126 < ord(c) < 160])

    def test_it_streams(self):
        with subprocess.Popen([sys.executable, ROOT / "scripts/generate.py", "--program", BINARY, checkpoint, "Der", "--device", "cpu",
                               "--tokens", "1000000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
            self.assertEqual(process.stdout.read(3), b"Der")
            process.stdout.read(2000)  # while the rest is being written
            self.assertIsNone(process.poll())
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            self.assertEqual((process.wait(timeout=30), process.stderr.read()), (130, b"\n"))

    def test_a_reader_that_leaves(self):
        command = f"'{sys.executable}' '{ROOT}/scripts/generate.py' --program '{BINARY}' '{checkpoint}' Der --device cpu --tokens 1000000000"
        result = subprocess.run(f"{command} | head -c 5", shell=True, capture_output=True, env=environment(), timeout=60)
        self.assertEqual((result.stdout[:3], result.stderr), (b"Der", b""))
        with open("/dev/full", "wb") as full:
            result = subprocess.run(command, shell=True, stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=60)
        self.refused(1, "No space left on device", result)
        result = subprocess.run(f"{command.replace('1000000000', '3')} >&-", shell=True, stderr=subprocess.PIPE, env=environment())
        self.assertEqual(result.returncode, 0, result.stderr)

    def test_bad_arguments(self):
        self.refused(2, "/nowhere/x", script("x", model="/nowhere/x"))
        self.refused(2, "--temperature", script("x", "--temperature", "warm"))
        self.refused(2, "--top_k", script("x", "--top_k", -1))
        self.refused(1, "/nowhere/train_gpt is missing", subprocess.run(
            [sys.executable, ROOT / "scripts/generate.py", "--program", "/nowhere/train_gpt", checkpoint], capture_output=True))
        self.assertEqual(script("x", "--tokens", 0).returncode, 2)

    def test_unknown_tokens(self):
        shards = work / "shards_of_no_tokenizer"
        shards.mkdir()
        for vocab, code in ((256, 0), (300, 1)):
            (shards / "train_000.bin").write_bytes(struct.pack("<256i", 20240520, 1, 200, *[0] * 253) + struct.pack("<200H", *range(200)))
            out = work / f"no_tokenizer_{vocab}"
            subprocess.run([BINARY, "--train", shards / "train_*.bin", "--layers", "1", "--heads", "1", "--channels", "8", "--seq_len", "8",
                            "--steps", "1", "--batch", "1", "--vocab", str(vocab), "--device", "cpu", "--out", out], check=True,
                           capture_output=True, env=environment())
            result = script("x", "--tokens", 5, model=next(out.glob("step_*")))
            self.assertEqual(result.returncode, code, result.stderr)
            self.assertIn(b"does not say what its tokens are" if code == 0 else b"300 tokens are neither", result.stderr)
        # Bytes, and more tokens than these.
        more = train("more", "byte", "--steps", "1", "--vocab", "300", "--warmup", "0")
        shown = self.written(script("x", "--tokens", 400, "--temperature", 100, model=more)).decode()
        self.assertIn("\ufffd", shown)

    def gpt2(self, name, bpe, env):
        """What generate.py shows is what bpe makes of train_gpt's tokens."""
        model = train(name, "gpt2", "--steps", "60", **env)
        text = SENTENCE.encode()
        for prompt in (text[:19], text[:20], text[:21], b""):  # characters whole and split
            given = bpe.encode_ordinary(prompt.decode(errors="replace"))
            greedy = tokens(given or [50256], 60, "--temperature", 0, model=model)[1]
            written = b"".join(bpe.decode_single_token_bytes(token) for token in given + greedy)
            shown = self.written(script("-", "--temperature", 0, "--tokens", 60, model=model, stdin=prompt, env=environment(**env)))
            self.assertEqual(shown.decode(), written.decode(errors="backslashreplace"))

    def test_gpt2_tokens(self):
        (work / "stand_in").mkdir()
        (work / "stand_in/tiktoken.py").write_text(STAND_IN)
        stand_in = {}
        exec(STAND_IN, stand_in)
        self.gpt2("stand_in_tokens", stand_in["Encoding"](), {"PYTHONPATH": str(work / "stand_in")})

    def test_gpt2_tokens_of_tiktoken(self):
        if importlib.util.find_spec("tiktoken") is None:
            self.skipTest("no tiktoken")
        import tiktoken
        try:
            bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:
            self.skipTest(f"no GPT-2 vocabulary: {e}")
        self.gpt2("tiktoken_tokens", bpe, {})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: test_generate.py BINARY [NAME...]")
    BINARY = str(Path(sys.argv[1]).resolve())
    tests = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    if sys.argv[2:]:
        tests = unittest.TestSuite(Generate("test_" + name) for name in sys.argv[2:])
    result = unittest.TextTestRunner(verbosity=2).run(tests)
    bad = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - bad - len(result.skipped)} passed, {bad} failed, {len(result.skipped)} skipped")
    sys.exit(bad > 0)
