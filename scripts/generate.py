#!/usr/bin/env python3
"""Goes on with a text, as a model has learned it, and shows it as it is written.

    scripts/generate.py runs/124M/CHECKPOINT "The ship lay"
    scripts/generate.py runs/124M/CHECKPOINT "The ship lay" --tokens 500 --temperature 0.9 --top_k 40 --seed 7
    scripts/generate.py runs/124M/CHECKPOINT - < beginning.txt      the prompt from the standard input

The same seed writes the same text. Without a prompt the text starts as a document does, after the token that ends one (under bytes:
after a newline). Of a prompt that is longer than the context, the end counts. What is written may run over the end of a document into
the next one. Bytes that are no UTF-8, and those that would steer a terminal, are shown as \\xHH.

The model runs in ./train_gpt --generate; this script turns text into the checkpoint's tokens and back. GPT-2's come from the package
tiktoken (installed into .venv on first need), in which bytes that are no UTF-8 have no place: in a prompt they become U+FFFD.
"""
import argparse
import codecs
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import data
import packages


def fail(text, code=1):
    print(f"generate: {text}", file=sys.stderr)
    sys.exit(code)


def find_tokenizer(identity, vocabulary):
    """The tokenizer that a checkpoint names; where it names none, the one with as many tokens."""
    if identity == "unknown":
        known = {data.ByteTokenizer.vocab: "byte", data.Gpt2Tokenizer.vocab: "gpt2"}.get(vocabulary)
        if known:
            print(f"generate: the checkpoint does not say what its tokens are: taken for {known}", file=sys.stderr)
            return data.ByteTokenizer() if known == "byte" else data.Gpt2Tokenizer(data.DOWNLOADS)
    else:
        tokenizer = data.ByteTokenizer()
        if identity == data.tokenizer_identity(tokenizer):
            return tokenizer
        if vocabulary >= data.Gpt2Tokenizer.vocab:
            tokenizer = data.Gpt2Tokenizer(data.DOWNLOADS)
            if identity == data.tokenizer_identity(tokenizer):
                return tokenizer
    fail(f"the checkpoint's {vocabulary} tokens are neither bytes nor GPT-2's: train_gpt --generate takes and gives their numbers")


class Printable:
    """Bytes to text, piece by piece. A character that is not whole yet is held back."""
    STEERS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def __call__(self, piece, final=False):
        text = self.decoder.decode(piece, final)
        return self.STEERS.sub(lambda found: "".join(f"\\x{byte:02x}" for byte in found[0].encode()), text)


def write(text):
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def stream(program, given):
    """From the line with which train_gpt begins to its last token."""
    _, identity, _, vocabulary, _, context = program.stdout.readline().split() or [b""] * 6
    if not identity:
        return  # it has said why
    if int(vocabulary) >= data.Gpt2Tokenizer.vocab and importlib.util.find_spec("tiktoken") is None:
        program.kill()  # packages.need starts this script anew
        packages.need("tiktoken")
    tokenizer = find_tokenizer(identity.decode(), int(vocabulary))
    pieces = tokenizer.tokens()
    prompt = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    tokens = tokenizer.encode_text(prompt)
    with contextlib.suppress(BrokenPipeError):  # it has ended, and will have said why
        program.stdin.write(" ".join(map(str, tokens or [tokenizer.eot])).encode())
    with contextlib.suppress(BrokenPipeError):
        program.stdin.close()
    printable = Printable()
    write(printable(b"".join(pieces[token] for token in tokens)))
    for line in program.stdout:
        token = int(line)
        # A model may have more tokens than its tokenizer (--vocab): these are no text.
        write(printable(pieces[token] if token < len(pieces) else "\ufffd".encode()))
    write(printable(b"", final=True) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of train_gpt")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="- for the standard input; -- before one that begins with -")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="how many to write [200]")
    parser.add_argument("--program", type=Path, default=packages.ROOT / "train_gpt", metavar="PATH", help="[./train_gpt]")
    for name, metavar in (("temperature", "X"), ("top_k", "K"), ("seed", "N"), ("device", "NAME"), ("kernels", "NAME")):
        parser.add_argument(f"--{name}", metavar=metavar, help="train_gpt's, with its default: see train_gpt --help")
    args = parser.parse_args()
    if args.tokens < 1:
        parser.error("--tokens must be at least 1")
    return args


def main():
    args = parse_arguments()
    if not args.program.is_file():
        fail(f"{args.program} is missing: build it with make")
    command = [args.program, "--model", args.checkpoint, "--generate", str(args.tokens)]
    for name in ("temperature", "top_k", "seed", "device", "kernels"):
        if vars(args)[name] is not None:
            command += [f"--{name}", vars(args)[name]]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        stream(program, args.prompt)
        said = program.stderr.read()  # behind the text: tokens per second, or what was wrong
        code = program.wait()
    finally:
        program.kill()
    sys.stderr.buffer.write(said)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by whoever started us
    try:
        main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read us has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        fail(str(e))
