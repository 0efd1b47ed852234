#!/usr/bin/env python3
"""Turns text into token shards that train_gpt reads, and writes tokenizer.bin beside them.

    scripts/data.py tinyshakespeare                        1.1 MB of Shakespeare, as bytes
    scripts/data.py austen --tokenizer gpt2                six novels by Jane Austen, from a Debian package
    scripts/data.py tinystories --tokenizer gpt2           2.2 GB of stories for small models
    scripts/data.py fineweb10B --tokenizer gpt2 --shards 10   web text, GPT-2 tokens already, 100M to a shard
    scripts/data.py linux --tokenizer gpt2 --tokens 160e6  the kernel's C and documents (GPL), from a Debian package of 140 MB
    scripts/data.py text:PATH --val_frac 0.04              your own: a file (plain, .xz, .gz), a directory, or a URL
    scripts/data.py hellaswag --tokenizer gpt2             not to train on: 10,042 questions, for train_gpt --hellaswag

Bytes need nothing but Python; GPT-2's BPE comes from the package tiktoken (installed into .venv on first need). What is
held out is the last of the text, whole documents of it where there are several. --pack FILE.xz also writes the documents as
one text: on a machine without a network, text:FILE.xz makes the same shards of it.

Shard (llm.c's format):  256 int32 {20240520, 1, number of tokens, 0...}, then the tokens as uint16.
tokenizer.bin (llm.c's): 256 int32 {20240328, 2, vocabulary, end-of-text token, 0...}, then for each token one byte of
length and its bytes. Every document is preceded by the end-of-text token: 50256 under gpt2, a newline under byte.
hellaswag.bin (llm.c's format for multiple choice): evaluate.h has it.
"""
import argparse
import array
import bisect
import concurrent.futures
import contextlib
import glob
import gzip
import hashlib
import http.client
import json
import lzma
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections import deque
from pathlib import Path

import packages

GITHUB = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
GITHUB_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-%s.txt"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_%s_%06d.bin"
FINEWEB_SHARDS = 103  # training shards that exist there
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
HELLASWAG_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"  # TensorFlow Datasets has the same
DATASETS = ("tinyshakespeare", "austen", "tinystories", "fineweb10B", "linux")

DOWNLOADS = packages.ROOT / "data" / "downloads"
SEPARATOR = b"<|endoftext|>"  # between the documents of one text file
BLOCK = 1 << 20  # bytes of text tokenized at a time


class Unreachable(Exception):
    """A source that does not answer: another one may."""


def say(text):
    print(f"data: {text}", file=sys.stderr, flush=True)


def fail(text, code=1):
    sys.exit(say(text) or code)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: each yields documents, as bytes

class Progress:
    """A line that rewrites itself on a terminal, and a line every ten seconds elsewhere."""

    def __init__(self, label, total=None, unit="MB"):
        self.label, self.total, self.unit = label, total, unit
        self.start = self.last = time.time()

    def show(self, done, start=0):
        tty, now = sys.stderr.isatty(), time.time()
        if now - self.last < (0.2 if tty else 10):
            return
        self.last = now
        rate = (done - start) / 1e6 / (now - self.start)
        total = f" of {self.total / 1e6:.1f}" if self.total else ""
        line = f"data: {self.label}: {done / 1e6:.1f}{total} {self.unit}, {rate:.1f} {self.unit}/s"
        print(f"\r{line}   " if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)

    def done(self):
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def download(url, path, sha256=None, tries=5):
    """Fetches url to path, continuing path.part where an earlier try stopped. Complete (the server's length) or nothing."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    say(f"downloading {url}")
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=30) as reply:
                if have and reply.status != 206:  # the server does not resume
                    have = 0
                length = reply.headers.get("Content-Length", "")
                total = have + int(length) if length.isdecimal() and len(length) < 20 else None  # what is no number says nothing
                progress = Progress(path.name, total)
                with open(part, "ab" if have else "wb") as f:
                    start = have
                    while block := reply.read(1 << 18):
                        f.write(block)
                        have += len(block)
                        progress.show(have, start)
                progress.done()
            if total is None or have == total:
                break
            reason = f"the connection ended after {have} of {total} bytes"
        except urllib.error.HTTPError as e:
            if e.code == 416:  # part is as long as the file, or longer: of another version
                part.unlink()
            elif e.code not in (408, 429) and e.code < 500:
                raise Unreachable(f"{url}: {e}") from None
            reason = str(e)
        except (OSError, urllib.error.URLError, http.client.HTTPException) as e:  # URLError is an OSError
            reason = str(getattr(e, "reason", e)) or type(e).__name__
            if not have and attempt == 1:  # twice without a byte: it is not the connection that is shaky
                raise Unreachable(f"{url}: {reason}") from None
        except (ValueError, OverflowError) as e:  # half an IPv6 address, a port that no machine has, characters that HTTP does not take
            raise Unreachable(f"{url!r}, or where it leads, is no address: {e}") from None
        if attempt + 1 < tries:
            say(f"{reason}; trying again")
            time.sleep(min(2**attempt, 10))
    else:
        raise Unreachable(f"{url}: {reason}; what came is kept in {part}: run this again to continue")
    if sha256:
        found = hashlib.sha256(part.read_bytes()).hexdigest()
        if found != sha256:
            part.unlink()
            raise Unreachable(f"{url}: not the expected content (sha256 {found}, expected {sha256})")
    os.replace(part, path)
    return path


def text_documents(path):
    """The documents of a text file (plain, .xz or .gz), split at <|endoftext|>; read in pieces, so of any size."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rb") as f:
        rest = b""
        while block := f.read(16 * BLOCK):
            *complete, rest = (rest + block).split(SEPARATOR)
            yield from complete
        yield rest


def directory_documents(root):
    """Every text file under a directory, in order of name; hidden ones, and those that are not UTF-8 text, left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        for name in sorted(f for f in files if not f.startswith(".")):
            path = Path(folder, name)
            if path.is_file():
                text = path.read_bytes()
                if is_text(text):
                    yield text


def is_text(content):
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def austen_documents(downloads):
    """Six novels from Debian's r-cran-janeaustenr, fetched and unpacked as an ordinary user, read without R.

    Rdata.rdb is a row of {uint32 length (big-endian), zlib stream}; each stream is one R value, serialised as XDR:
    "X\\n", int32 format (2 or 3), two R versions, in format 3 the native encoding (int32 length, bytes); then a character
    vector: int32 16 (STRSXP), int32 count, and for every line int32 flags (low byte 9: CHARSXP), int32 length, bytes.
    """
    package = downloads / "r-cran-janeaustenr.deb"
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        say("fetching the Debian package r-cran-janeaustenr")
        fetch_debian("r-cran-janeaustenr", package)
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg", "-x", package, unpacked], check=True)
        blocks = Path(unpacked, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(blocks):
        stream = zlib.decompressobj()
        data = stream.decompress(blocks[at + 4:])
        if len(data) != int.from_bytes(blocks[at:at + 4], "big"):
            fail(f"{package}: damaged: delete it and try again")
        at = len(blocks) - len(stream.unused_data)
        yield b"\n".join(r_character_vector(data)) + b"\n"


def r_character_vector(data):
    def int32(at):
        return struct.unpack_from(">i", data, at)[0]

    assert data[:2] == b"X\n", "not an R value in XDR form"
    at = 14  # past "X\n", the format and two versions
    if int32(2) == 3:
        at += 4 + int32(at)
    assert int32(at) & 0xff == 16, "not a character vector"
    count = int32(at + 4)
    at += 8
    for _ in range(count):
        flags, length = int32(at), int32(at + 4)
        assert flags & 0xff == 9
        line = data[at + 8:at + 8 + max(length, 0)]  # length -1: NA
        latin1 = flags >> 12 & 4
        yield line.decode("latin-1").encode() if latin1 else line
        at += 8 + len(line)


def linux_documents(downloads):
    """The sources of Linux, from Debian's package linux-source: files .c, .h, .rst and .txt, in the order of a hash of their
    paths, so that the first of them are a fair sample of all, and the last, which are held out, are too. Linux 6.1.192 has
    59,782 documents in 787 MB; 160.1 M GPT-2 tokens are 345 MB, and 61 MB as --pack writes them.

    Left out: registers of chips, written by generators (drivers/gpu/drm/amd/include, every directory asic_reg), files above
    half a megabyte (nearly all are tables), what is not UTF-8, and what is there already under another name.
    """
    package = downloads / "linux-source.deb"
    if not package.exists():
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as tmp:  # linux-source itself is empty: it depends on the one with the version
            fetch_debian("linux-source", Path(tmp, "empty.deb"))
            depends = subprocess.run(["dpkg-deb", "--field", Path(tmp, "empty.deb"), "Depends"], capture_output=True, text=True)
        version = re.search(r"linux-source-[\w.]+", depends.stdout)
        if not version:
            raise Unreachable("linux-source: depends on no linux-source-VERSION")
        say(f"fetching the Debian package {version[0]}, about 140 MB")
        fetch_debian(version[0], package)

    def files():
        """(path, size, file) of every regular file of the archive in the archive, as a stream."""
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as dpkg, \
                tarfile.open(fileobj=dpkg.stdout, mode="r|") as outer:
            for archive in outer:
                if not (archive.isfile() and re.search(r"/linux-source-[^/]*\.tar\.\w+$", archive.name)):
                    continue
                with tarfile.open(fileobj=outer.extractfile(archive), mode="r|*") as inner:
                    for member in inner:
                        if member.isfile():  # its path without the directory that all have in common
                            yield member.name.partition("/")[2], member.size, inner.extractfile(member)

    with tempfile.TemporaryFile(dir=downloads) as text:  # one after the other as they come; `found` is all that memory holds
        found, seen, progress = [], set(), Progress("unpacking")  # (hash of the path, begin, size)
        try:
            for path, size, file in files():
                if (not path.endswith((".c", ".h", ".rst", ".txt")) or size > 1 << 19 or "/asic_reg/" in path
                        or path.startswith("drivers/gpu/drm/amd/include/")):
                    continue
                content = file.read()
                digest = hashlib.sha256(content).digest()
                if digest in seen or not is_text(content):
                    continue
                seen.add(digest)
                found.append((hashlib.sha256(path.encode()).digest(), text.tell(), text.write(content)))
                progress.show(text.tell())
        except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
            fail(f"{package}: damaged ({e}): delete it and try again")
        progress.done()
        say(f"linux: {len(found):,} documents, {text.tell():,} bytes")
        for _, begin, size in sorted(found):
            text.seek(begin)
            yield text.read(size)


def fetch_debian(package, path):
    """apt-get download; where the machine's package lists lack it (or are empty), with lists of our own."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Unreachable(f"{package}: no apt-get and dpkg on this machine")
    with tempfile.TemporaryDirectory() as tmp:
        own = ["-o", f"Dir::State::lists={tmp}/lists", "-o", f"Dir::Cache={tmp}/cache"]
        quick = ["-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "APT::Sandbox::User="]
        for options in ([], own):
            if options:
                os.makedirs(f"{tmp}/lists/partial")
                subprocess.run(["apt-get", *quick, *options, "update"], cwd=tmp, capture_output=True)
            run = subprocess.run(["apt-get", *quick, *options, "download", package], cwd=tmp, capture_output=True, text=True)
            found = list(Path(tmp).glob("*.deb"))
            if run.returncode == 0 and found:
                temporary = path.with_name(path.name + ".part")
                shutil.copyfile(found[0], temporary)
                os.replace(temporary, path)
                return
    raise Unreachable(f"{package}: {(run.stderr.strip() or 'apt-get has no such package').splitlines()[-1]}")


def reachable(name, downloads):
    """Whether another dataset could be had, for the hint after a failure."""
    try:
        if name in ("austen", "linux"):
            with tempfile.TemporaryDirectory() as tmp:
                fetch_debian({"austen": "r-cran-janeaustenr", "linux": "linux-source"}[name], Path(tmp, "small.deb"))
        else:
            url = {"tinyshakespeare": GITHUB, "tinystories": TINYSTORIES % "valid", "fineweb10B": FINEWEB % ("val", 0)}[name]
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
        return True
    except (Unreachable, OSError, http.client.HTTPException, ValueError, OverflowError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: bytes of text -> tokens, as little-endian uint16

class ByteTokenizer:
    """A token is a byte. The end-of-text token is a newline: every text has it, so a sample can start from it."""
    vocab, eot = 256, 10

    def tokens(self):
        return [bytes([i]) for i in range(256)]

    def encode(self, pieces):
        for piece in pieces:
            out = bytearray(2 * len(piece))
            out[::2] = piece
            yield out

    def encode_text(self, text):
        return list(text)


class Gpt2Tokenizer:
    vocab, eot = 50257, 50256

    def __init__(self, downloads):
        packages.need("tiktoken")
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(downloads / "tiktoken"))  # workers read it too
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:  # tiktoken downloads its two files with another package, whose errors we do not know
            fail(f"tiktoken could not download GPT-2's vocabulary ({type(e).__name__}): try again with a network, point "
                 "TIKTOKEN_CACHE_DIR at a directory that has it, or train on shards of --tokenizer byte")

    def tokens(self):
        return [self.bpe.decode_single_token_bytes(i) for i in range(self.eot)] + [SEPARATOR]

    def encode(self, pieces):
        """In parallel processes, in order; a few pieces ahead of the reader, so that the text need not fit in memory."""
        workers = len(os.sched_getaffinity(0))
        with concurrent.futures.ProcessPoolExecutor(workers, initializer=gpt2_start) as pool:
            queue = deque()
            for piece in pieces:
                queue.append(pool.submit(gpt2_encode, piece))
                if len(queue) > 3 * workers:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()

    def encode_text(self, text):
        """The same for a short text, as a list."""
        return self.bpe.encode_ordinary(text.decode(errors="replace"))


def gpt2_start():
    global gpt2
    import tiktoken
    gpt2 = tiktoken.get_encoding("gpt2")


def gpt2_encode(piece):
    return array.array("H", gpt2.encode_ordinary(piece.decode(errors="replace"))).tobytes()


# GPT-2's BPE never joins anything across a single newline between two visible ASCII characters, so a text cut after one
# has the same tokens as the whole.
CUT = re.compile(rb"(?<=[!-~]\n)(?=[!-~])")


def pieces(document):
    at = 0
    while at < len(document):
        cut = CUT.search(document, at + BLOCK)
        end = cut.start() if cut else len(document)
        yield document[at:end]
        at = end


def tokenize(documents, tokenizer, path, limit=None, keep=None):
    """Writes the tokens of all documents to path, or of the first with `limit` tokens or somewhat more: of whole documents.
    Returns where each document begins, and the number of tokens. keep(document): called for each that was taken."""
    eot, progress, done = struct.pack("<H", tokenizer.eot), Progress("tokens", limit, unit="M"), 0
    under_way = deque()  # for each piece: the document that begins with it, or None
    begins = []

    def all_pieces():
        for document in documents:
            if document.strip():
                for i, piece in enumerate(pieces(document)):
                    under_way.append(document if i == 0 else None)
                    yield piece

    with open(path, "wb") as f:
        for tokens in tokenizer.encode(all_pieces()):
            document = under_way.popleft()
            if document is not None:
                if limit and done >= limit:
                    break
                if keep:
                    keep(document)
                begins.append(done)
                done += f.write(eot) // 2
            done += f.write(tokens) // 2
            progress.show(done)
    progress.done()
    return begins, done


def held_out_begin(begins, count, fraction):
    """Where the held-out last of `count` tokens begins: with the first document that begins in the last `fraction`, so that
    no document is in both parts; in the midst of the last document where that is longer."""
    begin = count - int(count * fraction)
    whole = bisect.bisect_left(begins, begin)
    return begins[whole] if begin < count and whole < len(begins) else begin


# ---------------------------------------------------------------------------------------------------------------------
# What is written

def write_atomic(path, blocks):
    """Under a temporary name, then renamed: a file with its name is whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        for block in blocks:
            f.write(block)
    os.replace(temporary, path)


def header(*fields):
    return struct.pack("<256i", *fields, *[0] * (256 - len(fields)))


def write_shards(out, split, tokens, begin, end, shard_tokens):
    """Tokens begin..end of an open file of uint16, as split_000.bin, split_001.bin, ..."""
    def blocks(first, count):
        yield header(20240520, 1, count)
        tokens.seek(2 * first)
        while count:
            block = tokens.read(2 * min(count, BLOCK))
            count -= len(block) // 2
            yield block

    names = []
    for first in range(begin, end, shard_tokens):
        names.append(f"{split}_{len(names):03d}.bin")
        write_atomic(out / names[-1], blocks(first, min(shard_tokens, end - first)))
    return names


def tokenizer_blocks(tokenizer):
    return [header(20240328, 2, tokenizer.vocab, tokenizer.eot)] + [bytes([len(t)]) + t for t in tokenizer.tokens()]


def tokenizer_identity(tokenizer):
    """By which a checkpoint names its tokenizer: dataloader.h's hash of tokenizer.bin, byte by byte."""
    low = 2**64 - 1
    state = 0
    for byte in b"".join(tokenizer_blocks(tokenizer)):
        state = (state + byte + 1) & low
        for _ in range(2):
            state = ((state ^ state >> 32) * 0xd6e8feb86659fd93) & low
        state ^= state >> 32
    return "%016x" % state


def text_shards(args, out, tokenizer):
    """Datasets that arrive as text."""
    kind, _, where = args.dataset.partition(":")
    splits = {"train": None}
    if kind == "tinyshakespeare":
        splits["train"] = text_documents(download(GITHUB, args.downloads / "tinyshakespeare.txt", GITHUB_SHA256))
    elif kind == "austen":
        splits["train"] = austen_documents(args.downloads)
    elif kind == "linux":
        splits["train"] = linux_documents(args.downloads)
    elif kind == "tinystories":
        splits = {s: text_documents(download(TINYSTORIES % n, args.downloads / f"tinystories_{s}.txt"))
                  for s, n in (("val", "valid"), ("train", "train"))}
    elif re.match("https?://", where):
        name = hashlib.sha256(where.encode()).hexdigest()[:8] + "_" + urllib.parse.urlsplit(where).path.rsplit("/", 1)[-1]
        splits["train"] = text_documents(download(where, args.downloads / name))
    else:
        splits["train"] = directory_documents(where) if os.path.isdir(where) else text_documents(Path(where))

    files, temporary = [], out / "tokens.tmp"
    for split, documents in splits.items():
        with packed(args.pack) as keep:
            begins, count = tokenize(documents, tokenizer, temporary, args.tokens, keep)
            if not count:
                fail(f"{args.dataset}: no text in it")
        held_out = held_out_begin(begins, count, args.val_frac) if len(splits) == 1 else count
        with open(temporary, "rb") as tokens:
            files += write_shards(out, split, tokens, 0, held_out, args.shard_tokens)
            files += write_shards(out, "val", tokens, held_out, count, args.shard_tokens)
        temporary.unlink()
    return files


@contextlib.contextmanager
def packed(path):
    """A function that adds a document to the text at path, which is there when all are in it; None without a path."""
    if not path:
        yield None
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with lzma.open(temporary, "wb") as text:
            yield lambda document: text.write(SEPARATOR + document)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fineweb_shards(args, out, have):
    """Shards that exist as such. 100M tokens each, 200 MB. have: names of those that are there already, and good."""
    files = []
    for split, index in [("val", 0)] + [("train", i) for i in range(1, args.shards + 1)]:
        path = out / f"{split}_{index:03d}.bin"
        files.append(path.name)
        if path.name in have:
            continue
        download(FINEWEB % (split, index), path)
        with open(path, "rb") as f:
            magic, version, count = struct.unpack("<3i", f.read(12))
        if (magic, version, path.stat().st_size) != (20240520, 1, 1024 + 2 * count):
            path.unlink()
            raise Unreachable(f"{FINEWEB % (split, index)}: what came is not a whole shard")
    return files


def llmc_question(example):
    """[context, four endings] as llm.c words them: the text as it is, a space in between."""
    return [example["ctx"]] + [" " + ending for ending in example["endings"]]


def lm_eval_question(example):
    """The same as lm-eval 0.4 words them: the activity in front, a capital for the second part of the context, and without the
    marks of the part that comes from WikiHow: "[title]" becomes a full stop, others go. A space at the end of the context goes
    to the endings."""
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = clean(f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}")
    spaces = context[len(context.rstrip()):] + " "
    return [context.rstrip()] + [spaces + clean(ending) for ending in example["endings"]]


def hellaswag_files(args, out, tokenizer):
    """The questions in the words of llm.c and of lm-eval, a file for each."""
    wordings = {"hellaswag.bin": llmc_question, "hellaswag_lm_eval.bin": lm_eval_question}
    path, examples = download(HELLASWAG, args.downloads / "hellaswag_val.jsonl", HELLASWAG_SHA256), []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            example = json.loads(line)
            if len(example["endings"]) != 4 or example["label"] not in range(4):
                raise ValueError("not four endings of which one is right")
            examples.append((example["label"], *([piece.encode() for piece in question(example)] for question in wordings.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{path}: line {len(examples) + 1} is no question of HellaSwag ({e!r}): delete it and try again")

    for wording, name in enumerate(wordings, 1):
        encoded = tokenizer.encode(piece for example in examples for piece in example[wording])
        blocks = []
        for number, example in enumerate(examples):
            block = struct.pack("<3H", number, example[0], 4)
            for _ in range(5):
                tokens = next(encoded)
                block += struct.pack("<H", len(tokens) // 2) + tokens
            blocks.append(struct.pack("<2H", 65535, 4 + len(block)) + block)
        write_atomic(out / name, [header(20240522, 1, len(examples), max(map(len, blocks)))] + blocks)
    return list(wordings)


def fingerprint(where):
    """Of a text on this machine: shards are made again when it has changed."""
    digest = hashlib.sha256()
    documents = directory_documents(where) if os.path.isdir(where) else text_documents(Path(where))
    for document in documents:
        digest.update(document + SEPARATOR)
    return digest.hexdigest()


def read_manifest(path):
    """{"settings": {...}, "files": {name: {"bytes": N, "sha256": ...}}}, or None: none, of a run that did not end, or of
    another shape."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else None
        whole = isinstance(found["settings"], dict) and isinstance(found["files"], dict)
        return found if whole and all(Path(name).name == name for name in found["files"]) else None
    except (ValueError, TypeError, KeyError):
        return None


def describe(path):
    """What the manifest says about a file; None if there is no such file."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def remove_empty(directory):
    try:
        directory.rmdir()
    except OSError:
        pass


def shard_tokens(path):
    with open(path, "rb") as f:
        return struct.unpack("<3i", f.read(12))[2]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help=f"{', '.join(DATASETS)}, text:PATH or hellaswag")
    parser.add_argument("--tokenizer", choices=("byte", "gpt2"), default="byte")
    parser.add_argument("--val_frac", type=float, metavar="X",
                        help="the last X of the tokens are held out for validation [0.1; tinystories and fineweb10B bring their own]")
    parser.add_argument("--tokens", type=float, metavar="N", help="take the first documents, N tokens of them [all]")
    parser.add_argument("--pack", type=Path, metavar="FILE.xz", help="write their text to this file as well")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the shards go [data/DATASET_TOKENIZER]")
    parser.add_argument("--shards", type=int, default=10, metavar="N", help="fineweb10B: training shards to fetch, up to 103 [10]")
    parser.add_argument("--shard_tokens", type=int, default=10**8, metavar="N", help="tokens in one shard at most [100000000]")
    parser.add_argument("--downloads", type=Path, metavar="DIR", default=DOWNLOADS,
                        help="where downloaded originals are kept [data/downloads]")
    args = parser.parse_args()
    kind, _, where = args.dataset.partition(":")
    if kind == "text" and where:
        if not re.match("https?://", where):
            if not os.path.exists(where):
                parser.error(f"{where}: no such file or directory")
            if not os.path.isfile(where) and not os.path.isdir(where):
                parser.error(f"{where}: neither a file nor a directory")
        else:
            try:
                parts = urllib.parse.urlsplit(where)
                named = bool(parts.hostname) and (parts.port or True)
                (parts.hostname or "").encode("idna"), where.encode()
            except ValueError:  # a port that is no number, half an IPv6 address, characters that no name has
                named = False
            if not named or re.search(r"[\s\x00-\x1f]", where):
                parser.error(f"{where!r} is no address")
    elif args.dataset not in (*DATASETS, "hellaswag"):
        parser.error(f"no dataset {args.dataset!r}: there are {', '.join(DATASETS)}, text:PATH and hellaswag")
    if kind == "hellaswag" and args.val_frac is not None:
        parser.error("hellaswag has nothing to train on: leave --val_frac out")
    if kind == "fineweb10B" and args.tokenizer != "gpt2":
        parser.error("fineweb10B is GPT-2 tokens: add --tokenizer gpt2")
    if kind in ("fineweb10B", "tinystories") and args.val_frac is not None:
        parser.error(f"{kind} has a validation split of its own: leave --val_frac out")
    for flag in ("tokens", "pack"):
        if kind in ("fineweb10B", "tinystories") and getattr(args, flag) is not None:
            parser.error(f"--{flag} is not for {kind}")
    if args.tokens is not None and not 1 <= args.tokens < 1e15:
        parser.error("--tokens must be at least 1")
    if args.pack and args.pack.suffix != ".xz":
        parser.error(f"--pack {args.pack}: its name must end in .xz")
    args.val_frac = 0.1 if args.val_frac is None else args.val_frac
    if not 0 <= args.val_frac < 1:
        parser.error("--val_frac must be at least 0 and below 1")
    if not 1 <= args.shards <= FINEWEB_SHARDS:
        parser.error(f"--shards must be 1 to {FINEWEB_SHARDS}")
    if not 2 <= args.shard_tokens < 2**31:
        parser.error("--shard_tokens must be at least 2 and below 2^31, which is what the header holds")
    name = Path(where.rstrip("/")).name.split(".")[0] if kind == "text" else kind
    args.out = args.out or packages.ROOT / "data" / f"{name}_{args.tokenizer}"
    return args


def main():
    args = parse_arguments()
    out, manifest = args.out, args.out / "manifest.json"

    # The manifest says how the shards were made; it is written last, so shards with a complete one are whole.
    settings = {"dataset": args.dataset, "tokenizer": args.tokenizer}
    if args.dataset == "fineweb10B":
        settings["shards"] = args.shards
    elif args.dataset != "hellaswag":
        settings.update(val_frac=args.val_frac, shard_tokens=args.shard_tokens)
        if args.tokens:
            settings["tokens"] = args.tokens
    if args.dataset.startswith("text:") and os.path.exists(args.dataset[5:]):
        settings["sha256"] = fingerprint(args.dataset[5:])

    found = read_manifest(manifest)
    if found is None and any(out.glob("*.bin")) and not manifest.exists():
        fail(f"{out} holds shards that this script did not make: choose another --out")
    files = found["files"] if found else {}
    good = [name for name, properties in files.items() if describe(out / name) == properties]
    if found and found["settings"] == settings and len(good) == len(files) and not args.pack:
        say(f"{out} is there already")
    else:
        # All is made beside what is there, which goes only when that is whole.
        staging = out / f"new_{args.dataset.partition(':')[0]}"
        if args.dataset != "fineweb10B":  # a download goes on where it stopped
            shutil.rmtree(staging, ignore_errors=True)
            good = []
        elif found and found["settings"].get("dataset") != "fineweb10B":
            good = []
        staging.mkdir(parents=True, exist_ok=True)
        try:
            tokenizer = ByteTokenizer() if args.tokenizer == "byte" else Gpt2Tokenizer(args.downloads)
            write_atomic(staging / "tokenizer.bin", tokenizer_blocks(tokenizer))
            if args.dataset == "fineweb10B":
                names = fineweb_shards(args, staging, good)
            else:
                names = (hellaswag_files if args.dataset == "hellaswag" else text_shards)(args, staging, tokenizer)
        except BaseException as e:
            if args.dataset != "fineweb10B":
                shutil.rmtree(staging, ignore_errors=True)
                remove_empty(out)
            if not isinstance(e, Unreachable):
                raise
            say(" ".join(str(e).split()))  # a redirection in circles is told in three lines
            if args.dataset == "hellaswag":
                fail(f"hellaswag can't be had here; {args.downloads}/hellaswag_val.jsonl is taken where it lies")
            others = [d for d in DATASETS if d != args.dataset and reachable(d, args.downloads)] + ["text:PATH"]
            fail(f"{args.dataset} can't be had here; these can: {', '.join(others)}")
        new = {name: describe(staging / name if (staging / name).exists() else out / name) for name in names + ["tokenizer.bin"]}
        write_atomic(manifest, [b"{}"])
        for stale in [*out.glob("train_*.bin"), *out.glob("val_*.bin")]:
            if stale.name not in new:
                stale.unlink()
        for name in new:
            if (staging / name).exists():
                os.replace(staging / name, out / name)
        shutil.rmtree(staging, ignore_errors=True)
        write_atomic(manifest, [json.dumps({"settings": settings, "files": new}, indent=1).encode()])
        files = new

    if args.dataset == "hellaswag":
        say(f"{shard_tokens(out / 'hellaswag.bin'):,} questions; in lm-eval's words: {out / 'hellaswag_lm_eval.bin'}")
        return print(f"--hellaswag {shlex.quote(str(out / 'hellaswag.bin'))}")

    def total(split):
        return sum(shard_tokens(out / name) for name in files if name.startswith(split + "_"))

    say(f"{total('train'):,} tokens to train on, {total('val'):,} to validate on")
    place = glob.escape(str(out))  # the trainer expands what is in it
    print(" ".join(f"--{split} {shlex.quote(f'{place}/{split}_*.bin')}" for split in ("train", "val") if total(split)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", 130)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:  # a full disk, a directory or file that is not good
        fail(str(e))
