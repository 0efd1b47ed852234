#!/usr/bin/env python3
"""Tests of scripts/data.py: shards and tokenizer.bin hold what the text held, whatever its form and however it arrives.

Needs Python alone; the tests of GPT-2's tokens need tiktoken and its vocabulary, and are skipped without."""
import contextlib
import csv
import glob
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import lzma
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import unittest
import urllib.request
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "data.py"
sys.path.insert(0, str(ROOT / "scripts"))
import compare  # noqa: E402 (scripts/compare.py)
import data  # noqa: E402 (scripts/data.py)
import timeline  # noqa: E402 (scripts/timeline.py)

TEXT = "".join(f"Line {i} of a text: \u201cna\u00efve\u201d\n\n" for i in range(20000)).encode()


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, **kwargs)


def shards(directory, split):
    """All tokens of a split, after a check of every header."""
    tokens = b""
    for path in sorted(Path(directory).glob(f"{split}_*.bin")):
        content = path.read_bytes()
        header = struct.unpack("<256i", content[:1024])
        assert header[:2] == (20240520, 1) and not any(header[3:]), path
        assert len(content) == 1024 + 2 * header[2], path
        tokens += content[1024:]
    return struct.unpack(f"<{len(tokens) // 2}H", tokens)


def tokenizer(directory):
    content = Path(directory, "tokenizer.bin").read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header[:2] == (20240328, 2)
    at, tokens = 1024, []
    while at < len(content):
        tokens.append(content[at + 1:at + 1 + content[at]])
        at += 1 + content[at]
    assert len(tokens) == header[2]
    return tokens, header[3]


def decode(directory):
    tokens, eot = tokenizer(directory)
    everything = shards(directory, "train") + shards(directory, "val")
    assert everything[0] == eot
    return b"".join(tokens[t] for t in everything[1:])


class Data(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir = Path(self.temporary.name)
        self.out = self.dir / "out"
        (self.dir / "text.txt").write_bytes(TEXT)

    def make(self, source, *arguments):
        result = run(f"text:{source}", "--out", self.out, *arguments)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result

    def refused(self, code, words, *arguments):
        result = run(*arguments)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertIn(words, result.stderr.splitlines()[-1])
        self.assertNotIn("Traceback", result.stderr)

    def test_bytes_come_back(self):
        result = self.make(self.dir / "text.txt", "--val_frac", "0.04")
        self.assertEqual(decode(self.out), TEXT)
        self.assertEqual(len(shards(self.out, "val")), int((len(TEXT) + 1) * 0.04))
        self.assertEqual(result.stdout.strip(), f"--train '{self.out}/train_*.bin' --val '{self.out}/val_*.bin'")
        tokens, eot = tokenizer(self.out)
        self.assertEqual((len(tokens), tokens[eot]), (256, b"\n"))

    def test_compressed_and_small_shards(self):
        for suffix, compress in ((".xz", lzma.compress), (".gz", gzip.compress)):
            path = self.dir / f"text.txt{suffix}"
            path.write_bytes(compress(TEXT))
            self.make(path, "--shard_tokens", "100000")
            self.assertEqual(decode(self.out), TEXT)
            self.assertGreater(len(list(self.out.glob("train_*.bin"))), 5)

    def test_documents(self):
        (self.dir / "text.txt").write_bytes(b"<|endoftext|>one<|endoftext|>\n<|endoftext|>two")
        self.make(self.dir / "text.txt", "--val_frac", "0")
        self.assertEqual(bytes(shards(self.out, "train")), b"\none\ntwo")
        self.assertEqual(list(self.out.glob("val_*")), [])

    def test_whole_documents_are_held_out(self):
        documents = [b"%d " % i * 50 for i in range(20)]
        (self.dir / "text.txt").write_bytes(b"<|endoftext|>".join(documents))
        self.make(self.dir / "text.txt", "--val_frac", "0.14")  # 352 of 2520 tokens: the last 2 documents of 151 and some of the one before
        self.assertEqual(bytes(shards(self.out, "val")), b"\n" + documents[18] + b"\n" + documents[19])
        self.make(self.dir / "text.txt", "--val_frac", "0.01")  # less than the last
        self.assertEqual(len(shards(self.out, "val")), int(sum(len(d) + 1 for d in documents) * 0.01))

    def test_directory_of_sources(self):
        for name, content in (("b.py", b"second"), ("a/z.c", b"first"), ("c.bin", b"\xff\xfe"), (".git/x", b"no"), ("d.o", b"\0")):
            path = self.dir / "src" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.make(self.dir / "src", "--val_frac", "0")
        self.assertEqual(bytes(shards(self.out, "train")), b"\nsecond\nfirst")

    def test_second_run_reuses_and_a_changed_text_does_not(self):
        path = self.dir / "text.txt"
        self.make(path)
        before = (self.out / "train_000.bin").stat().st_mtime_ns
        self.assertIn("is there already", self.make(path).stderr)
        self.assertEqual((self.out / "train_000.bin").stat().st_mtime_ns, before)
        path.write_bytes(TEXT + b"more")
        self.assertNotIn("is there already", self.make(path).stderr)
        self.assertEqual(decode(self.out), TEXT + b"more")
        (self.out / "val_000.bin").unlink()  # an incomplete directory is made again
        self.make(path)
        self.assertEqual(decode(self.out), TEXT + b"more")

    def test_fewer_shards_leave_no_old_ones(self):
        self.make(self.dir / "text.txt", "--shard_tokens", "50000")
        self.make(self.dir / "text.txt")
        self.assertEqual(decode(self.out), TEXT)

    def test_good_shards_stay_until_others_are_whole(self):
        self.make(self.dir / "text.txt")
        before = {path.name: path.read_bytes() for path in self.out.iterdir()}
        (self.dir / "empty.txt").write_bytes(b" \n")
        (self.dir / "cut.xz").write_bytes(lzma.compress(TEXT)[:-500])
        for source in ("empty.txt", "cut.xz"):
            self.refused(1, "", f"text:{self.dir}/{source}", "--out", self.out)
            self.assertEqual({path.name: path.read_bytes() for path in self.out.iterdir()}, before)
        self.refused(1, "", f"text:{self.dir}/empty.txt", "--out", self.dir / "new")
        self.assertFalse((self.dir / "new").exists())

    def test_a_damaged_shard_is_made_again(self):
        self.make(self.dir / "text.txt")
        for name in ("train_000.bin", "val_000.bin", "tokenizer.bin"):
            content = bytearray((self.out / name).read_bytes())
            content[1500] ^= 1
            (self.out / name).write_bytes(content)
            self.assertNotIn("is there already", self.make(self.dir / "text.txt").stderr)
            self.assertEqual(decode(self.out), TEXT)
        self.assertIn("is there already", self.make(self.dir / "text.txt").stderr)

    def test_manifests_of_another_shape(self):
        self.make(self.dir / "text.txt")
        good = (self.out / "manifest.json").read_text()
        for text in ("", "[]", "7", "null", '{"settings": 1, "files": {}}', '{"settings": {}, "files": ["x"]}',
                     '{"settings": {}, "files": {"../../x": {}}}', good.replace("{\n", "[", 1), good[:-3], "\xff"):
            (self.out / "manifest.json").write_text(text, encoding="latin-1")
            self.make(self.dir / "text.txt")
            self.assertEqual(decode(self.out), TEXT)

    def test_odd_places(self):
        os.mkfifo(self.dir / "fifo")
        self.refused(2, "neither a file nor a directory", f"text:{self.dir}/fifo", "--out", self.out)
        self.out = self.dir / "a [b]*?"
        printed = self.make(self.dir / "text.txt").stdout
        for split, pattern in zip(("train", "val"), shlex.split(printed)[1::2]):
            self.assertEqual(glob.glob(pattern), [f"{self.out}/{split}_000.bin"])
        for address in ("http://[", "http://a b/c", "http://x:port/", "http://\u2603..example/x", "https://"):
            self.refused(2, "is no address", f"text:{address}", "--out", self.dir / "url", "--downloads", self.dir)

    def test_errors_are_one_clear_line(self):
        self.refused(2, "no dataset 'shakespeare'", "shakespeare")
        self.refused(2, "no such file", "text:/nowhere/at/all")
        self.refused(2, "--val_frac", f"text:{self.dir}/text.txt", "--val_frac", "1")
        self.refused(2, "--val_frac", "tinystories", "--val_frac", "0.1")
        self.refused(2, "--tokenizer gpt2", "fineweb10B")
        self.refused(2, "--shards", "fineweb10B", "--tokenizer", "gpt2", "--shards", "200")
        self.refused(2, "--tokens", f"text:{self.dir}/text.txt", "--tokens", "0")
        self.refused(2, "--tokens is not for tinystories", "tinystories", "--tokens", "9")
        self.refused(2, "must end in .xz", f"text:{self.dir}/text.txt", "--pack", "text.txt")
        (self.dir / "empty.txt").write_bytes(b" \n")
        self.refused(1, "no text in it", f"text:{self.dir}/empty.txt", "--out", self.out)
        other = self.dir / "other"
        other.mkdir()
        (other / "train_000.bin").write_bytes(b"someone's")
        self.refused(1, "did not make", f"text:{self.dir}/text.txt", "--out", other)
        self.assertEqual((other / "train_000.bin").read_bytes(), b"someone's")

    QUESTIONS = [{"activity_label": "Washing a dog", "ctx_a": "A man fills  a tub.", "ctx_b": "the Dog", "ctx": "A man fills  a tub. the Dog",
                  "label": 2, "endings": ["runs.", "sits [title] in the d\u00e9j\u00e0 vu.", "is washed [step] by  him.", "[substeps] barks."]},
                 {"activity_label": "Health", "ctx_a": "[header] How to sleep [title] Go to bed. [step]", "ctx_b": "",
                  "ctx": "[header] How to sleep [title] Go to bed. [step]", "label": 0, "endings": ["Sleep.", "Eat", "Run", "Sit"]}]
    WORDED = {"hellaswag.bin": [["A man fills  a tub. the Dog", " runs.", " sits [title] in the d\u00e9j\u00e0 vu.", " is washed [step] by  him.",
                                 " [substeps] barks."],
                                ["[header] How to sleep [title] Go to bed. [step]", " Sleep.", " Eat", " Run", " Sit"]],
              # by hand after lm_eval/tasks/hellaswag/utils.py of lm-eval 0.4; the space behind "bed." was before "[step]"
              "hellaswag_lm_eval.bin": [["Washing a dog: A man fills a tub. The dog", " runs.", " sits. in the d\u00e9j\u00e0 vu.", " is washed by him.",
                                         "  barks."],
                                        ["Health: How to sleep. Go to bed.", "  Sleep.", "  Eat", "  Run", "  Sit"]]}

    def hellaswag(self, tokenizer, decode):
        downloads = self.dir / "downloads"
        downloads.mkdir()
        (downloads / "hellaswag_val.jsonl").write_text("".join(json.dumps(question) + "\n" for question in self.QUESTIONS))
        result = run("hellaswag", "--tokenizer", tokenizer, "--out", self.out, "--downloads", downloads)
        self.assertEqual((result.returncode, result.stdout), (0, f"--hellaswag {self.out}/hellaswag.bin\n"), result.stderr)
        self.assertIn("2 questions", result.stderr)
        for name, worded in self.WORDED.items():
            content = (self.out / name).read_bytes()
            header = struct.unpack("<256i", content[:1024])
            words, found, longest = list(memoryview(content[1024:]).cast("H")), [], 0
            while words:
                mark, size, number, label, endings = words[:5]
                self.assertEqual((mark, number, label, endings), (65535, len(found), self.QUESTIONS[number]["label"], 4))
                self.assertEqual(size % 2, 0)
                rest, words, pieces, longest = words[5:size // 2], words[size // 2:], [], max(longest, size)
                for _ in range(5):
                    pieces.append(decode(rest[1:1 + rest[0]]))
                    rest = rest[1 + rest[0]:]
                self.assertEqual(rest, [])
                found.append(pieces)
            self.assertEqual(found, worded)
            self.assertEqual(header[:4], (20240522, 1, 2, longest))
        self.assertIn("is there already", run("hellaswag", "--tokenizer", tokenizer, "--out", self.out, "--downloads", downloads).stderr)
        return downloads

    def test_hellaswag(self):
        downloads = self.hellaswag("byte", lambda tokens: bytes(tokens).decode())
        self.assertEqual(tokenizer(self.out)[1], 10)
        self.refused(2, "leave --val_frac out", "hellaswag", "--val_frac", "0.1")
        for line in ("{}", "[]", "no json", json.dumps({**self.QUESTIONS[0], "label": "2"}), json.dumps({**self.QUESTIONS[0], "endings": ["a"]}),
                     json.dumps({**self.QUESTIONS[0], "ctx": 7})):
            (downloads / "hellaswag_val.jsonl").write_text(json.dumps(self.QUESTIONS[0]) + "\n" + line + "\n")
            self.refused(1, "line 2 is no question of HellaSwag", "hellaswag", "--out", self.dir / "other", "--downloads", downloads)
            self.assertFalse((self.dir / "other").exists())

    def gpt2_tokens(self):
        if importlib.util.find_spec("tiktoken") is None:
            self.skipTest("no tiktoken")
        import tiktoken
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:
            self.skipTest(f"no GPT-2 vocabulary: {e}")

    def test_hellaswag_gpt2(self):
        bpe = self.gpt2_tokens()
        self.hellaswag("gpt2", bpe.decode)

    def test_r_character_vector(self):
        def value(version):
            lines = ((64, b"plain"), (8, "d\u00e9j\u00e0".encode()), (4, b"d\xe9j\xe0"), (64, b""))
            encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
            return (b"X\n" + struct.pack(">3i", version, 0, 0) + encoding + struct.pack(">2i", 16, len(lines) + 1) +
                    b"".join(struct.pack(">2i", 9 | gp << 12, len(text)) + text for gp, text in lines) +
                    struct.pack(">2i", 9, -1))
        for version in (2, 3):
            lines = list(data.r_character_vector(value(version)))
            self.assertEqual([line.decode() for line in lines], ["plain", "d\u00e9j\u00e0", "d\u00e9j\u00e0", "", ""])

    def linux_package(self, files):
        """A .deb of the form of linux-source's: an archive of sources in an archive."""
        tree = self.dir / "package"
        (tree / "usr/src").mkdir(parents=True)
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN/control").write_text("Package: linux-source-6.1\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\n"
                                             "Description: x\n")
        with tarfile.open(tree / "usr/src/linux-source-6.1.tar.xz", "w:xz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"linux-source-6.1/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("linux-source-6.1/link.c")
            link.type, link.linkname = tarfile.SYMTYPE, "init/main.c"
            archive.addfile(link)
        (self.dir / "downloads").mkdir()
        package = self.dir / "downloads/linux-source.deb"
        subprocess.run(["dpkg-deb", "--build", tree, package], check=True, capture_output=True)
        return package

    @unittest.skipUnless(shutil.which("dpkg-deb"), "no dpkg-deb")
    def test_linux(self):
        good = {f"drivers/{i}/{name}": f"{i}: {name}\n".encode() * (i + 1)
                for i in range(30) for name in ("a.c", "b.h", "c.rst", "d.txt")}
        bad = {"Makefile": b"no", "x/y.S": b"no", "drivers/gpu/drm/amd/include/x.h": b"no", "a/asic_reg/x.h": b"no no",
               "large.c": b"x" * (1 << 19 | 1), "latin.c": b"d\xe9j\xe0", "nul.c": b"a\0b", "copy.c": good["drivers/7/a.c"]}
        package = self.linux_package({**good, **bad})

        def make(source, out, *arguments):
            result = run(source, "--out", out, "--downloads", package.parent, *arguments)
            self.assertEqual(result.returncode, 0, result.stderr)
            tokens = [bytes(shards(out, split)) for split in ("train", "val")]
            return tokens, [path.read_bytes() for path in sorted(out.glob("*.bin"))]

        (train, val), _ = make("linux", self.out)
        order = sorted(good, key=lambda path: hashlib.sha256(path.encode()).digest())
        self.assertEqual(train + val, b"".join(b"\n" + good[path] for path in order))
        self.assertTrue(any(b"\n" + good[path] == val[:len(good[path]) + 1] for path in order))  # begins with a document
        self.assertLessEqual(len(val), 0.1 * len(train + val))
        # The first 4000 tokens in whole documents; and the text of them makes the same shards elsewhere.
        pack = self.dir / "pack.txt.xz"
        (some, held_out), direct = make("linux", self.out, "--tokens", "4000", "--pack", pack)
        self.assertTrue((train + val).startswith(some + held_out))
        self.assertTrue(4000 <= len(some + held_out) < 4000 + max(map(len, good.values())) + 1)
        _, packed = make(f"text:{pack}", self.dir / "elsewhere")
        self.assertEqual(packed, direct)
        package.write_bytes(package.read_bytes()[:-300])
        self.refused(1, "damaged", "linux", "--out", self.dir / "new", "--downloads", package.parent)
        self.assertEqual(sorted(path.name for path in package.parent.iterdir()), ["linux-source.deb"])

    def test_pieces(self):
        """What is tokenized in parallel is the whole text, cut only where GPT-2's tokens end in any case."""
        text = TEXT * 4 + b"a b\n" * 300000 + b" " * 2 * data.BLOCK + b"\n \n\n\n"
        pieces = list(data.pieces(text))
        self.assertEqual(b"".join(pieces), text)
        self.assertGreater(len(pieces), 2)
        for before, after in zip(pieces, pieces[1:]):
            self.assertRegex(before[-2:] + after[:1], rb"[!-~]\n[!-~]")

    def test_a_text_of_several_pieces(self):
        text = b"a line of it\n" * (2 * data.BLOCK // 13 + 1)  # and one document
        (self.dir / "long.txt").write_bytes(text)
        self.make(self.dir / "long.txt")
        self.assertEqual(decode(self.out), text)

    def test_gpt2(self):
        path = self.dir / "text.txt"
        text = TEXT * 4 + "  odd   spaces\n \n\n\tand 12345's\u00a0ends\n".encode() * 1000  # several pieces
        path.write_bytes(text)
        bpe = self.gpt2_tokens()
        self.make(path, "--tokenizer", "gpt2")
        tokens = shards(self.out, "train") + shards(self.out, "val")
        self.assertEqual(list(tokens), [50256] + bpe.encode_ordinary(text.decode()))
        self.assertEqual(decode(self.out), text)
        self.assertEqual(tokenizer(self.out)[1], 50256)


class Download(unittest.TestCase):
    """Against a server on this machine that hangs up half way, or forgets how to resume."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir = Path(self.temporary.name)
        test = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                start = 0
                if test.raw:
                    self.wfile.write(test.raw.pop(0))
                    return
                if test.ranges and "Range" in self.headers:
                    start = int(self.headers["Range"].split("=")[1].rstrip("-"))
                test.requests.append((self.headers.get("Range"), start))
                if start >= len(TEXT) or self.path == "/gone.txt":
                    self.send_error(416 if start else 404)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(TEXT) - start))
                self.end_headers()
                self.wfile.write(TEXT[start:start + test.give.pop(0)] if test.give else TEXT[start:])

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.requests, self.give, self.ranges, self.raw = [], [], True, []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.url = f"http://127.0.0.1:{server.server_port}"

    def fetch(self, name="text.txt", dataset=None):
        """As the command does, in this process: without waiting between tries or asking other sources."""
        arguments = ["data.py", dataset or f"text:{self.url}/{name}", "--out", f"{self.dir}/out", "--downloads", f"{self.dir}/downloads"]
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.stderr = io.StringIO()
        with mock.patch.object(sys, "argv", arguments), mock.patch("time.sleep"), mock.patch("data.reachable", lambda *_: True), \
                mock.patch("urllib.request.urlopen", no_proxy), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(self.stderr):
            try:
                data.main()
            except SystemExit as e:
                return e.code
        return 0

    def starts(self):
        return [start for _, start in self.requests]

    def test_an_interrupted_download_goes_on_where_it_stopped(self):
        self.give = [100000, 50000]
        self.assertEqual(self.fetch(), 0)
        self.assertEqual(self.starts(), [0, 100000, 150000])
        self.assertEqual(decode(self.dir / "out"), TEXT)

    def test_also_in_a_later_run_of_the_command(self):
        self.give = [1000] * 5
        self.assertEqual(self.fetch(), 1)
        self.assertEqual(list((self.dir / "out").glob("train*")), [])
        self.assertEqual(self.fetch(), 0)
        self.assertEqual(self.starts(), [0, 1000, 2000, 3000, 4000, 5000])
        self.assertEqual(decode(self.dir / "out"), TEXT)
        self.assertEqual(self.fetch(), 0)
        self.assertIn("is there already", self.stderr.getvalue())
        self.assertEqual(len(self.requests), 6)

    def test_a_server_that_does_not_resume(self):
        self.give, self.ranges = [70000], False
        self.assertEqual(self.fetch(), 0)
        self.assertEqual(decode(self.dir / "out"), TEXT)

    def test_a_part_that_is_longer_than_the_file(self):
        self.give = [1000] * 5
        self.fetch()
        part, = (self.dir / "downloads").glob("*.part")
        part.write_bytes(TEXT + b"x")
        self.assertEqual(self.fetch(), 0)
        self.assertEqual(decode(self.dir / "out"), TEXT)

    def test_what_cannot_be_had_names_what_can(self):
        with mock.patch.object(data, "DATASETS", ("austen",)):
            self.assertEqual(self.fetch("gone.txt"), 1)
        self.assertEqual(len(self.requests), 1)  # a 404 is an answer: no second try
        self.assertIn("404", self.stderr.getvalue())
        self.assertTrue(self.stderr.getvalue().endswith("can't be had here; these can: austen, text:PATH\n"))

    def test_answers_that_are_no_proper_ones(self):
        """A server that breaks the protocol: no traceback, and a later try gets it all."""
        for answer in (b"nonsense\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nab",
                       b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
                       b"HTTP/1.1 999 Odd\r\n\r\n", b"HTTP/1.1 200\r\n" + b"x: y\r\n" * 200 + b"\r\n"):
            self.raw = [answer] * 5
            self.assertEqual(self.fetch(), 1, answer)
            self.assertIn("can't be had here", self.stderr.getvalue().splitlines()[-1])
            self.assertNotIn("Traceback", self.stderr.getvalue())
        self.raw = []
        shutil.rmtree(self.dir / "downloads")
        self.assertEqual(self.fetch(), 0)
        self.assertEqual(decode(self.dir / "out"), TEXT)

    def test_redirections_that_lead_nowhere(self):
        """One line says so, whether or not the address can be read, and the shards of another text stay."""
        self.assertEqual(self.fetch(), 0)
        before = {path.name: path.read_bytes() for path in (self.dir / "out").iterdir()}
        for address in (b"http://[::", b"//[", b"ftp://[::1", b"http://127.0.0.1:x/", b"http://127.0.0.1:" + b"9" * 20, b"http://a..b/",
                        b"http://" + b"a" * 64 + b"/", b"http://\xe2\x84\x80/", b"http://a\x01/", b"/again.txt"):
            answer = b"HTTP/1.1 302 Found\r\nLocation: " + address + b"\r\n\r\n"
            self.raw = [answer] * 50
            self.assertEqual(self.fetch("else.txt"), 1, address)
            _, said, last = [line for line in self.stderr.getvalue().splitlines() if not line.endswith("; trying again")]
            self.assertIn(f"{self.url}/else.txt", said)
            self.assertIn("can't be had here", last)
            self.assertEqual({path.name: path.read_bytes() for path in (self.dir / "out").iterdir()}, before)
            with mock.patch.object(data, "GITHUB", f"{self.url}/text.txt"), mock.patch.dict(os.environ, no_proxy="127.0.0.1"):
                self.raw = [answer] * 50
                self.assertFalse(data.reachable("tinyshakespeare", self.dir))

    def test_a_length_that_is_no_number(self):
        for length in (b"many", b"9" * 5000):
            self.raw = [b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n\r\n" + TEXT]
            self.assertEqual(self.fetch(), 0)
            self.assertEqual(decode(self.dir / "out"), TEXT)
            shutil.rmtree(self.dir / "out")
            shutil.rmtree(self.dir / "downloads")

    def test_hellaswag_is_checked(self):
        """What comes from the public address must be what it is known to be."""
        with mock.patch.object(data, "HELLASWAG", f"{self.url}/hellaswag_val.jsonl"):
            self.assertEqual(self.fetch(dataset="hellaswag"), 1)
        self.assertIn("not the expected content", self.stderr.getvalue())
        self.assertIn("hellaswag_val.jsonl is taken where it lies", self.stderr.getvalue().splitlines()[-1])
        self.assertFalse((self.dir / "out").exists())

    def test_the_query_of_an_address_is_no_suffix(self):
        self.raw = [b"HTTP/1.1 200 OK\r\n\r\n" + gzip.compress(TEXT)]
        self.assertEqual(self.fetch("text.gz?download=1"), 0)
        self.assertEqual(decode(self.dir / "out"), TEXT)

    def test_a_wrong_checksum_is_refused(self):
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaisesRegex(data.Unreachable, "not the expected content"):
            data.download(f"{self.url}/text.txt", self.dir / "x", sha256="0" * 64)
        self.assertEqual(list(self.dir.iterdir()), [])


class Compare(unittest.TestCase):
    """scripts/compare.py, on logs as they are found after a crash or in the wrong directory."""

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.dir = Path(self.temporary.name)

    def run_of(self, name, *lines):
        (self.dir / name).mkdir()
        (self.dir / name / "log.jsonl").write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
                                                             for line in lines))
        return self.dir / name

    @staticmethod
    def steps(n, **changes):
        return [{"step": i + 1, "loss": 5 - i / n, "step_ms": 2.0, "tokens_per_s": 9.0, **changes} for i in range(n)]

    def compare(self, code, *arguments):
        """(stdout, stderr). In this process, where nothing is installed: without matplotlib there is no picture."""
        stdout, stderr, ended = io.StringIO(), io.StringIO(), 0
        drawable = importlib.util.find_spec("matplotlib") is not None
        with mock.patch.object(sys, "argv", ["compare.py", *map(str, arguments)]), contextlib.redirect_stdout(stdout), \
                contextlib.redirect_stderr(stderr), mock.patch("packages.need", lambda *_, **__: drawable):
            try:
                compare.main()
            except SystemExit as e:
                ended = 1
                stderr.write(str(e))
        self.assertEqual(ended, code, stderr.getvalue())
        return stdout.getvalue(), stderr.getvalue()

    def test_lines_that_are_no_steps_are_left_out(self):
        good = self.run_of("good", *self.steps(50))
        torn = self.run_of("torn", *self.steps(50), b"", b'{"step": 51, "lo')
        odd = self.run_of("odd", b"[]\n7\nnull\n\n{}\n\xff\xfe\n", *self.steps(50), {"step": 51, "loss": "x", "step_ms": "y"},
                          {"step": 52, "loss": 1, "step_ms": 0, "tokens_per_s": 1}, b"[" * 100000 + b"\n")
        stdout, stderr = self.compare(0, good, torn, odd, "--png", self.dir / "x.png")
        self.assertIn(f"{torn}/log.jsonl: left out 1 of 51 lines", stderr)
        self.assertNotIn("a branch that has not saved", stderr)
        (torn / "log.before.jsonl").touch()
        self.assertIn(f"{torn}/log.jsonl: its last lines are of a branch that has not saved", self.compare(0, torn)[1])
        self.assertIn(f"{odd}/log.jsonl: left out 9 of 59 lines", stderr)
        self.assertEqual(len(re.findall(r"^(good|torn|odd) +50 +4\.02", stdout, re.M)), 3, stdout)

    def test_values_that_no_run_has(self):
        """Of other types, too large for a float or for a table, too small to be divided by: what is right beside them is shown."""
        large, good = 10 ** 400, self.steps(50)

        def with_values(key, values):
            """Behind 50 good steps one with each value."""
            steps = [{"step": 51 + i, "loss": 3.99, "step_ms": 2.0, "tokens_per_s": 9.0, key: value} for i, value in enumerate(values)]
            return self.run_of(key, *good, *steps)

        bad = [with_values(key, values) for key, values in
               (("step", (large, 1e300, [1], {})), ("step_ms", (large, 1e308, 1e15, 5e-324, [1])), ("tokens_per_s", (large, 1e308, "9", {})))]
        stdout, stderr = self.compare(0, *bad, "--png", self.dir / "x.png")
        for run, count in zip(bad, (4, 5, 4)):  # such a line is left out
            self.assertIn(f"{run}/log.jsonl: left out {count} of {50 + count} lines", stderr)
            self.assertRegex(stdout, rf"(?m)^{run.name} +50 +4\.020 +0 s +9$")
        kept = [with_values(key, values) for key, values in
                (("loss", (large, -large, 1e300, {})), ("val_loss", (large, 1e300, [1], {})), ("optimizer", ("dmuon", [1], {}, 7)),
                 ("val_bpb", (large, -large, 1e308, [1])), ("optimizer_ms", (large, 1e308, [1], {})))]
        stdout, stderr = self.compare(0, *kept, "--png", self.dir / "x.png", "--csv", self.dir / "x.csv")
        self.assertEqual(stderr, "")
        for run in kept:  # of these lines the value is
            self.assertRegex(stdout, rf"(?m)^{run.name} +54 +{'4.020' if run.name == 'loss' else '3.990'} +0 s +9$")
        self.assertNotRegex(stdout, r"\d{17}")
        self.assertEqual(compare.Run(kept[2]).optimizer, "dmuon")
        run = self.run_of("scores", *good, {"step": 50, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.5, "step_ms": "x", "val_loss": 0})
        self.assertRegex(self.compare(0, run, "--png", self.dir / "x.png")[0], r"(?m)^scores +50 +4\.020 +50\.00% +0 s +9$")

    def test_a_table_that_nobody_takes(self):
        """Few bytes, which only the last flush writes, and many."""
        for count in (10, 100000):
            command = [sys.executable, "-c", f"import packages; packages.run(lambda: print('x' * {count}))"]
            reader, writer = os.pipe()
            os.close(reader)
            with open("/dev/full", "w") as full, open(writer, "w") as closed:
                for where, code, line in ((full, 1, "-c: [Errno 28] No space left on device\n"), (closed, 141, "")):
                    done = subprocess.run(command, stdout=where, stderr=subprocess.PIPE, text=True, cwd=ROOT / "scripts")
                    self.assertEqual((done.returncode, done.stderr), (code, line))

    def test_runs_without_a_loss_are_left_out(self):
        good = self.run_of("good", *self.steps(50))
        null = self.run_of("null", *self.steps(50, loss=None))
        empty = self.run_of("empty")
        some = self.run_of("some", *self.steps(20, loss=None), *self.steps(20), *self.steps(30, loss=None))
        stdout, stderr = self.compare(0, null, good, empty, some, "--png", self.dir / "x.png")
        self.assertIn(f"left out {null}/log.jsonl: no loss in it is a finite number", stderr)
        self.assertIn(f"left out {empty}/log.jsonl: the run has no finished step yet", stderr)
        self.assertIn("some", stdout)
        self.assertIn("no run is left", self.compare(1, null, empty)[1])

    def test_where_a_run_reaches_a_loss(self):
        run = compare.Run(self.run_of("line", *self.steps(50)))  # 5, 4.98, 4.96 ...; 2 ms a step
        for loss, step in ((4.5, 26), (4.51, 25.5), (4.505, 25.75), (6, 1)):
            self.assertAlmostEqual(run.reach(loss)[0], step, delta=1e-9)
            self.assertAlmostEqual(run.reach(loss)[1], 0.002 * step, delta=1e-9)
        self.assertIsNone(run.reach(4))

    def test_a_picture_that_cannot_be_written(self):
        if importlib.util.find_spec("matplotlib") is None:
            self.skipTest("no matplotlib")
        good = self.run_of("good", *self.steps(50))
        for name in ("x.docx", "nowhere/x.png"):
            self.assertIn("cannot write the picture", self.compare(1, good, "--png", self.dir / name)[1])

    def test_what_is_no_file(self):
        """A FIFO, or a device, is neither read for ever nor replaced by a file. Names do not steer the terminal."""
        good = self.run_of("a\x1b[2J\udcff", *self.steps(50))
        stdout, _ = self.compare(0, good, "--csv", self.dir / "x.csv", "--png", self.dir / "x.png")
        self.assertIn(r"a\x1b[2J\udcff", stdout)
        os.mkfifo(self.dir / "fifo.csv")
        self.assertIn("fifo.csv: it is there, and not a file", self.compare(1, good, "--csv", self.dir / "fifo.csv", "--png", self.dir / "x.png")[1])
        self.assertTrue((self.dir / "fifo.csv").is_fifo())
        (self.dir / "fifos").mkdir()
        for name in ("log.jsonl", "trace.json"):
            os.mkfifo(self.dir / "fifos" / name)
        self.assertIn("fifos/log.jsonl is not a file", self.compare(1, self.dir / "fifos")[1])
        with self.assertRaisesRegex(SystemExit, "fifos/trace.json is not a file"):
            timeline.read_trace(self.dir / "fifos")

    def test_an_optimizer_has_one_color(self):
        """Whatever the order, the names, and how many runs there are of it; those of one are told apart by their lines."""
        runs = [self.run_of(name, *self.steps(3, optimizer=optimizer)) for name, optimizer in
                (("one", "muon"), ("adamw", "dmuon"), ("two", "adamw"), ("three", "dmuon"), ("dmuon", "muon"), ("four", "dmuon"))]
        runs += [self.run_of(name, *self.steps(3)) for name in ("d12_AdamW_1e-3", "best_dmuon", "muon.2", "adamw_or_muon", "sgd")]
        colors = {"adamw": "#4c72b0", "muon": "#dd8452", "dmuon": "#2a9d63"}
        for order in (runs, runs[::-1], runs[4:] + runs[:4], runs[1:2], runs[9:]):
            loaded = compare.load(order)
            styles = compare.styles(loaded)
            for run in loaded:
                expected = run.log[-1].get("optimizer") or {"d12_AdamW_1e-3": "adamw", "best_dmuon": "dmuon", "muon.2": "muon"}.get(run.name)
                self.assertEqual(run.optimizer, expected)
                if expected:
                    self.assertEqual(styles[run][0], colors[expected])
                else:
                    self.assertNotIn(styles[run][0], colors.values())
            self.assertEqual(len(set(map(str, styles.values()))), len(loaded))
        stdout, _ = self.compare(0, *runs[:3], "--png", self.dir / "x.png")  # the baseline is the run with adamw, not of that name
        self.assertRegex(stdout, r"(?m)^two +2\.0 ms .* 3 +0 s$")

    def test_tables_fit_into_80_columns(self):
        """A common number of runs, names longer than any column, all that can be known of a run."""
        runs = []
        for i in range(7):
            name = f"a_{'very_' * i}long_name_of_run_{i}"
            steps = self.steps(50, step_ms=123456.7, optimizer_ms=12345.6, tokens_per_s=1234567.8, optimizer="dmuon", val_loss=4.5 + i / 9)
            for entry in steps:
                entry["val_bpb"] = entry["val_loss"] / 3
            runs.append(self.run_of(name, *steps, {"step": 50, "hellaswag_acc": 0.25, "hellaswag_acc_norm": 0.2955}))
        for count in (1, 2, 7):
            with mock.patch.dict(os.environ, COLUMNS="80"):
                stdout, stderr = self.compare(0, *runs[:count], "--png", "x.png", "--csv", self.dir / "x.csv")
            self.assertEqual(stderr, "")
            Path("x.png").unlink(missing_ok=True)
            shown = [line for line in stdout.splitlines() if str(self.dir) not in line]
            self.assertLessEqual(max(map(len, shown)), 80, stdout)
            self.assertEqual(stdout.count("29.55%"), count)
            self.assertEqual(stdout.count("1.5000"), 1)
            for i in range(count):
                self.assertEqual(len(re.findall(rf"^a_\S*{i} ", stdout, re.M)), 2, stdout)  # a line in each of two tables
        self.assertNotIn("differ in length", stdout)
        other = self.run_of("other", *self.steps(50, val_loss=2.0, val_bpb=1.9))
        self.assertIn("compare bits per byte", self.compare(0, runs[0], other, "--png", self.dir / "x.png")[0])

    def test_csv(self):
        one = self.run_of("one", *self.steps(3, optimizer="muon"), {"step": 3, "hellaswag_acc": 0.5})
        (self.dir / "else").mkdir()
        two = self.run_of("else/one", *self.steps(2, val_loss=1.5, loss=None))
        self.compare(0, one, two, "--png", self.dir / "x.png", "--csv", self.dir / "x.csv")
        with open(self.dir / "x.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        self.assertEqual([(row["run"], row["step"]) for row in rows],
                         [(f"{self.dir.name}/one", s) for s in "123"] + [("else/one", s) for s in "12"])
        self.assertEqual([row["seconds"] for row in rows], ["0.002", "0.004", "0.006", "0.002", "0.004"])
        self.assertEqual([row["hellaswag_acc"] for row in rows], ["", "", "0.5", "", ""])
        self.assertEqual([row["val_loss"] for row in rows], ["", "", "", "1.5", "1.5"])
        self.assertEqual([row["loss"] for row in rows][1:4], [repr(5 - 1 / 3), repr(5 - 2 / 3), ""])
        self.assertIn("cannot write", self.compare(1, one, "--csv", self.dir / "nowhere" / "x.csv")[1])
        self.assertEqual(sorted(path.name for path in self.dir.iterdir() if path.is_file() and path.suffix != ".png"), ["x.csv"])

    def test_tensorboard(self):
        if importlib.util.find_spec("tensorboardX") is None:
            self.skipTest("no tensorboardX")
        from tensorboardX.event_file_writer import EventsWriter  # noqa: F401 (the package that was found is whole)
        from tensorboardX.proto.event_pb2 import Event

        def events(directory):
            found = []
            for path in directory.glob("events.out.tfevents.*"):
                content, at = path.read_bytes(), 0
                while at < len(content):  # records: length, its checksum, the event, its checksum
                    size, = struct.unpack_from("<Q", content, at)
                    event = Event.FromString(content[at + 12:at + 12 + size])
                    found += [(value.tag, event.step, round(value.simple_value, 5)) for value in event.summary.value]
                    at += 16 + size
            return sorted(found)

        good = self.run_of("good", *self.steps(2, val_loss=1.5, optimizer="muon"), {"step": 2, "hellaswag_acc": 0.5})
        self.compare(0, good, "--png", self.dir / "x.png", "--tensorboard", self.dir / "board")
        self.assertEqual(events(self.dir / "board" / "good"), sorted(
            [("loss/training", 1, 5.0), ("loss/training", 2, 4.5), ("loss/validation", 1, 1.5), ("loss/validation", 2, 1.5),
             ("step/step_ms", 1, 2.0), ("step/step_ms", 2, 2.0), ("step/tokens_per_s", 1, 9.0), ("step/tokens_per_s", 2, 9.0),
             ("hellaswag/hellaswag_acc", 2, 0.5)]))
        self.assertIn("holds events already", self.compare(1, good, "--tensorboard", self.dir / "board")[1])
        (self.dir / "a_file").write_text("")
        self.assertIn("cannot write to", self.compare(1, good, "--tensorboard", self.dir / "a_file")[1])

    def test_without_tensorboardX_one_line_says_so(self):
        good, empty = self.run_of("good", *self.steps(2)), self.dir / "nothing"
        empty.mkdir()
        for script in ROOT.glob("scripts/*.py"):  # where no .venv can be made
            (self.dir / script.name).write_bytes(script.read_bytes())
        (self.dir / "packages.py").write_text((ROOT / "scripts/packages.py").read_text().replace('ROOT / ".venv"', "Path(sys.prefix)"))
        code = "import sys; sys.modules['tensorboardX'] = None; sys.argv[0] = 'compare.py'; import importlib.util as u; " \
               "find = u.find_spec; u.find_spec = lambda name: None if name == 'tensorboardX' else find(name); import compare; compare.main()"
        done = subprocess.run([sys.executable, "-c", code, good, "--tensorboard", self.dir / "board"], capture_output=True, text=True,
                              cwd=self.dir, env={**os.environ, "PYTHONPATH": str(self.dir)})
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
        self.assertIn("needs the Python package(s) tensorboardX", done.stderr)

    def test_watch(self):
        """It shows a run that starts later, and each time it has got on; Ctrl-C ends it without a word."""
        out, other = self.run_of("adamw", *self.steps(3)), self.dir / "dmuon"
        code = "import importlib.util, compare; compare.WATCH_EVERY = 0.05; " \
               "compare.packages.need = lambda name, **_: importlib.util.find_spec(name) is not None; compare.main()"
        process = subprocess.Popen([sys.executable, "-c", code, out, other, "--watch", "--csv", self.dir / "x.csv", "--png", self.dir / "x.png"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "COLUMNS": "80"},
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        self.addCleanup(process.kill)
        timer = threading.Timer(60, process.kill)  # then readline ends
        timer.start()
        self.addCleanup(timer.cancel)

        def until(words):
            said = ""
            while not re.search(words, said):
                line = process.stdout.readline()
                self.assertTrue(line, said)
                said += line
            return said

        self.assertIn("1 of 2 runs have no step yet", until("(?m)^picture: "))
        pictured = self.dir / "x.png"
        before = pictured.stat().st_mtime_ns if pictured.exists() else None
        self.run_of("dmuon", *self.steps(2), b'{"step": 3, "lo')  # while its third line is written
        said = until("(?m)^dmuon +2 +4.500(?s:.*)^picture: ")
        self.assertNotIn("no step yet", said)
        with open(other / "log.jsonl", "ab") as f:
            f.write(b'ss": 3.5, "step_ms": 2.0, "tokens_per_s": 9.0}\n')
        until("(?m)^dmuon +3 +3.500(?s:.*)^picture: ")
        self.assertEqual(len((self.dir / "x.csv").read_text().splitlines()), 1 + 3 + 3)
        if before:
            self.assertGreater(pictured.stat().st_mtime_ns, before)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        self.assertEqual((process.returncode, stderr), (0, ""))


if __name__ == "__main__":
    result = unittest.TextTestRunner(verbosity=2).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__]))
    bad = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - bad - len(result.skipped)} passed, {bad} failed, {len(result.skipped)} skipped")
    sys.exit(bad > 0)
