#!/usr/bin/env python3
"""Weights in and out: train_gpt's checkpoints to Hugging Face's GPT-2, and back.

    scripts/hf.py export runs/124M/step_00001900.safetensors DIR    for transformers' GPT2LMHeadModel.from_pretrained(DIR)
    scripts/hf.py import DIR gpt2.safetensors                       then ./train_gpt --model gpt2.safetensors ... trains on
    scripts/hf.py import openai-community/gpt2 gpt2.safetensors     downloads it first (package huggingface_hub)

The model is GPT-2 in both. What differs: transformers keeps the matrices of its Conv1D as (inputs, outputs), train_gpt as
(outputs, inputs); names there may begin with "transformer."; the head is the token embedding, and no tensor of its own.
Weights only: an optimizer's state stays behind. Both sides are safetensors files; checkpoint.h tells the form of ours.
Needs the packages numpy and xxhash (installed into .venv on first need).
"""
import argparse
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import data
import packages

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
# What of config.json train_gpt computes: name, values, what transformers takes where it is left out.
OPTIONS = (("model_type", ("gpt2",), None),
           ("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
           ("layer_norm_epsilon", (1e-5,), 1e-5),
           ("scale_attn_weights", (True,), True),
           ("scale_attn_by_inverse_layer_idx", (False,), False),
           ("add_cross_attention", (False,), False),
           ("tie_word_embeddings", (True,), True),
           ("quantization_config", (None,), None))
SIZES = {"layers": "n_layer", "heads": "n_head", "channels": "n_embd", "seq_len": "n_positions", "vocab": "vocab_size"}


def fail(text):
    sys.exit(f"hf: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# safetensors files

class Reader:
    """A safetensors file: metadata, and tensors as fp32 on demand."""

    def __init__(self, path):
        self.path, self.size = path, path.stat().st_size
        if not path.is_file():
            fail(f"{path} is not a file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.begin = 8 + length
            if self.begin > self.size or length > MAX_HEADER:
                fail(f"{path} is not a safetensors file, or is cut short")
            self.header = file.read(length)
        try:
            header = json.loads(self.header)
            self.metadata = header.pop("__metadata__", {})
            self.types, self.shapes, self.places = {}, {}, {}  # by name
            for name, tensor in header.items():
                self.types[name], self.shapes[name] = str(tensor["dtype"]), tuple(tensor["shape"])
                self.places[name] = first, last = tensor["data_offsets"]
                if not all(type(x) is int and 0 <= x <= self.size for x in (*self.shapes[name], first, last)) or first > last:
                    raise ValueError
            self.metadata.get("format")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            fail(f"{path} is not a safetensors file: its header makes no sense")
        end = self.begin + max((last for _, last in self.places.values()), default=0)
        if end != self.size:
            fail(f"{path} is damaged: it has {self.size} bytes, its header asks for {end}")

    def bytes(self, name):
        first, last = self.places[name]
        return numpy.fromfile(self.path, numpy.uint8, last - first, offset=self.begin + first)

    def read(self, name):
        dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(self.types[name])
        if not dtype:
            fail(f"{self.path}: tensor {name} is of type {self.types[name]}; F32, F16 and BF16 are understood")
        values, count = self.bytes(name), math.prod(self.shapes[name])
        if values.nbytes != count * numpy.dtype(dtype).itemsize:
            fail(f"{self.path} is damaged: tensor {name} has {values.nbytes} bytes for {count} elements")
        values = values.view(dtype).reshape(self.shapes[name])
        return (values.astype("<u4") << 16).view("<f4") if dtype == "<u2" else values.astype("<f4", copy=False)


def checksum(content):
    return xxhash.xxh64_hexdigest(content)


NO_CHECKSUM = "0" * 16


def write(path, metadata, shapes, values, checked):
    """A safetensors file of fp32 tensors: shapes by name, values(name) gives each. checked: with the checksums of a
    checkpoint. Atomic."""
    sums = dict.fromkeys(shapes, NO_CHECKSUM)

    def header():
        meta = dict(metadata)
        if checked:
            meta |= {"checksum": NO_CHECKSUM, **{f"checksum.{name}": sums[name] for name in shapes}}
        entries, at = {"__metadata__": meta}, 0
        for name in sorted(shapes):
            begin, at = at, at + 4 * math.prod(shapes[name])
            entries[name] = {"data_offsets": [begin, at], "dtype": "F32", "shape": list(shapes[name])}
        text = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        if checked:
            text = text.replace(b'"checksum":"' + NO_CHECKSUM.encode(), f'"checksum":"{checksum(text)}'.encode(), 1)
        return len(text).to_bytes(8, "little") + text

    path = path.resolve()
    if path.exists() and not path.is_file():  # a device must not become one
        fail(f"{path} is there, and not a file")
    part = path.with_name(path.name + ".tmp")
    try:
        with open(part, "wb") as file:
            file.write(header())
            for name in sorted(shapes):
                content = numpy.ascontiguousarray(values(name), "<f4").reshape(-1).view(numpy.uint8).data
                sums[name] = checksum(content)
                file.write(content)
            file.seek(0)
            file.write(header())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path):
    """A checkpoint of train_gpt, verified from the first byte to the last."""
    if path.exists() and not path.is_file():
        fail(f"{path} is not a file")
    with open(path, "rb") as file:
        if file.read(8) == b"TRAINGPT":
            fail(f"{path} is of an earlier version of train_gpt, in a format that is no longer read")
    file = Reader(path)
    if file.metadata.get("format") != "train_gpt":
        fail(f"{path} is not a checkpoint of train_gpt")
    given = f'"checksum":"{file.metadata.get("checksum")}"'.encode()
    if checksum(file.header.replace(given, f'"checksum":"{NO_CHECKSUM}"'.encode(), 1)) != file.metadata.get("checksum"):
        fail(f"{path} is damaged: its header has changed")
    for name in file.shapes:
        if checksum(file.bytes(name)) != file.metadata.get(f"checksum.{name}"):
            fail(f"{path} is damaged: tensor {name} has changed")
    return file


# ---------------------------------------------------------------------------------------------------------------------
# The model

def transposed(name):
    """Whether it is the weight of a Conv1D."""
    return name.startswith("h.") and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def model_shapes(layers, channels, seq_len, vocab):
    """The tensors of train_gpt's model: (outputs, inputs) of a matrix."""
    C = channels
    shapes = {"wte.weight": (vocab, C), "wpe.weight": (seq_len, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for layer in range(layers):
        for name, outputs, inputs in (("attn.c_attn", 3 * C, C), ("attn.c_proj", C, C), ("mlp.c_fc", 4 * C, C),
                                      ("mlp.c_proj", C, 4 * C)):
            shapes[f"h.{layer}.{name}.weight"] = (outputs, inputs)
            shapes[f"h.{layer}.{name}.bias"] = (outputs,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{name}.weight"] = shapes[f"h.{layer}.{name}.bias"] = (C,)
    return shapes


def byte_tokenizer():
    """The files by which transformers' AutoTokenizer makes each byte of a text the token of its number."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these as themselves, and the others ...
    others = [b for b in range(256) if b not in printable]
    letters = {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}  # ... from U+0100 on
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"tokenizer.json": {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level,
                               "model": {"type": "BPE", "vocab": letters, "merges": []}},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}}


def export(path, directory):
    checkpoint = read_checkpoint(path)
    try:
        sizes = {name: int(checkpoint.metadata[name]) for name in SIZES}
    except (KeyError, ValueError):
        fail(f"{path} does not say the sizes of its model")
    vocab = sizes["vocab"]
    shapes = model_shapes(sizes["layers"], sizes["channels"], sizes["seq_len"], vocab)
    for name, shape in shapes.items():
        if checkpoint.shapes.get(name) != shape:
            fail(f"{path} has no tensor {name} of shape {shape}")
    theirs = {f"transformer.{name}": shape[::-1] if transposed(name) else shape for name, shape in shapes.items()}

    def values(name):
        name = name[len("transformer."):]
        return checkpoint.read(name).T if transposed(name) else checkpoint.read(name)

    end_of_text = 50256 if vocab == 50257 else None
    config = {"architectures": ["GPT2LMHeadModel"], **{theirs: sizes[ours] for ours, theirs in SIZES.items()},
              **{name: values[0] for name, values, _ in OPTIONS if values[0] is not None}, "n_inner": None, "attn_pdrop": 0.0,
              "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
              "torch_dtype": "float32"}
    files = {"config.json": config}
    if checkpoint.metadata.get("tokenizer") == data.tokenizer_identity(data.ByteTokenizer()):
        tokens = "Tokens are bytes: `ids = list(text.encode())`, or `transformers.AutoTokenizer.from_pretrained(...)` of it."
        files |= byte_tokenizer()
    elif vocab == 50257:
        tokens = "Tokens are GPT-2's: `transformers.AutoTokenizer.from_pretrained(\"openai-community/gpt2\")`."
    else:
        tokens = f"Tokens are those of its training data: numbers below {vocab}."
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "model.safetensors", {"format": "pt"}, theirs, values, checked=False)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    (directory / "README.md").write_text(
        f"A GPT-2 ({sizes['layers']} layers, {sizes['heads']} heads, {sizes['channels']} channels), trained by train_gpt"
        + (f" for {checkpoint.metadata['step']} steps" if "step" in checkpoint.metadata else "")
        + f".\n\n`transformers.GPT2LMHeadModel.from_pretrained(...)` of this directory loads it. {tokens}\n")
    print(f"{directory}: {', '.join(['model.safetensors', *files, 'README.md'])}. {tokens}")


def download(name):
    if importlib.util.find_spec("huggingface_hub") is None:
        fail(f"{name} is no file or directory here; to download the model of that name: pip install huggingface_hub")
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(
            name, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"]))
    except Exception as e:  # a dozen kinds, of three libraries
        fail(f"cannot download {name}: {str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}")


def read_config(path):
    """Sizes by train_gpt's names; ends where the model is not what train_gpt computes."""
    try:
        config = json.loads(path.read_text())
        sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    except OSError as e:
        fail(f"no config.json beside the weights ({e})")
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{path} is not the configuration of a GPT-2: {e}" + (" is missing" if isinstance(e, KeyError) else ""))
    for name, known, default in OPTIONS:
        if config.get(name, default) not in known:
            fail(f"{path} has {name} {json.dumps(config.get(name))}, which train_gpt does not compute (it has "
                 f"{' or '.join(map(json.dumps, known))})")
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= 65536:
            fail(f"{path} has {SIZES[name]} {size}: train_gpt takes 1 to 65536")
    C, heads = sizes["channels"], sizes["heads"]
    if config.get("n_inner") not in (None, 4 * C):
        fail(f"{path} has n_inner {config['n_inner']}, which train_gpt does not compute (it has 4 n_embd, {4 * C})")
    if C % heads or C % 8 or C > 8192 or C // heads > 256:
        fail(f"{path} has n_embd {C} and n_head {heads}: train_gpt takes multiples of 8 and of the heads, up to 8192, and up to "
             "256 a head")
    return sizes


def weights_of(where):
    """The safetensors files of a directory."""
    index = where / "model.safetensors.index.json"
    if index.exists():
        try:
            return [where / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, LookupError, TypeError, AttributeError):
            fail(f"{index} is not an index of safetensors files")
    if not (where / "model.safetensors").exists():
        old = " (pytorch_model.bin is of another kind: load it with transformers and save_pretrained it)"
        fail(f"{where} has no model.safetensors" + (old if (where / "pytorch_model.bin").exists() else ""))
    return [where / "model.safetensors"]


def import_(source, out):
    where = Path(source) if Path(source).exists() else download(source)
    directory, paths = (where, weights_of(where)) if where.is_dir() else (where.parent, [where])
    sizes = read_config(directory / "config.json")
    tensors = {}  # by train_gpt's name: file, name there
    for path in paths:
        file = Reader(path)
        for name in file.shapes:
            ours = name[len("transformer."):] if name.startswith("transformer.") else name
            if not ours.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in older files
                tensors[ours] = file, name
    shapes = model_shapes(sizes["layers"], sizes["channels"], sizes["seq_len"], sizes["vocab"])

    def theirs(name):
        file, there = tensors[name]
        return file.read(there)

    if "lm_head.weight" in tensors:
        if "wte.weight" in tensors and not numpy.array_equal(theirs("lm_head.weight"), theirs("wte.weight")):
            fail(f"{where} has an lm_head.weight that is not its wte.weight: train_gpt's head is the token embedding")
        del tensors["lm_head.weight"]
    for name, shape in shapes.items():
        shape = shape[::-1] if transposed(name) else shape
        if name not in tensors:
            fail(f"{where} has no tensor {name}")
        if tensors[name][0].shapes[tensors[name][1]] != shape:
            fail(f"{where} has tensor {name} of shape {tensors[name][0].shapes[tensors[name][1]]}, config.json asks for {shape}")
    if strange := sorted(set(tensors) - set(shapes)):
        fail(f"{where} has tensor {strange[0]}, which train_gpt's GPT-2 has not")

    write(out, {"format": "train_gpt", **{name: str(size) for name, size in sizes.items()}}, shapes,
          lambda name: theirs(name).T if transposed(name) else theirs(name), checked=True)
    print(f"{out}: train_gpt --model {out} starts from it ({sizes['layers']} layers, {sizes['heads']} heads, "
          f"{sizes['channels']} channels, {sizes['seq_len']} positions, vocabulary {sizes['vocab']})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|import")
    command = commands.add_parser("export", help="a checkpoint to a directory for transformers")
    command.add_argument("checkpoint", type=Path, metavar="CKPT")
    command.add_argument("directory", type=Path, metavar="DIR")
    command = commands.add_parser("import", help="a GPT-2 of transformers to a file for train_gpt --model")
    command.add_argument("source", metavar="DIR_OR_FILE_OR_NAME")
    command.add_argument("file", type=Path, metavar="FILE")
    args = parser.parse_args()

    global numpy, xxhash
    packages.need("numpy", "xxhash")
    import numpy
    import xxhash
    try:
        export(args.checkpoint, args.directory) if args.command == "export" else import_(args.source, args.file)
    except OSError as e:
        fail(f"{e.filename or args.command}: {e.strerror}")


if __name__ == "__main__":
    main()
