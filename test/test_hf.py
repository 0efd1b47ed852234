#!/usr/bin/env python3
"""Weights in and out, without a GPU: checkpoints read by others, scripts/hf.py, and transformers' GPT-2 beside ours.

    python3 test/test_hf.py ./train_gpt

What needs Python alone always runs; what needs numpy and xxhash, safetensors, or torch and transformers is skipped, and
counted, without. .venv's Python is taken where it has more (scripts/setup.sh --python).
"""
import importlib.util
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv" / "bin" / "python"
BINARY = None
OURS = ("numpy", "xxhash")


def have(*packages):
    return all(importlib.util.find_spec(package) for package in packages)


def needs(*packages):
    return unittest.skipUnless(have(*packages), f"no {', '.join(p for p in packages if not have(p))}")


def setUpModule():
    global temporary, work, shards, CKPT
    temporary = tempfile.TemporaryDirectory()
    work = Path(temporary.name)
    shards = work / "shards"
    chance = random.Random(5)
    write_shard(shards / "train_000.bin", [chance.randrange(97) * chance.randrange(2) for _ in range(40000)])  # half zeros
    write_shard(shards / "val_000.bin", [chance.randrange(97) * chance.randrange(2) for _ in range(65)])
    # Not square anywhere: 3 layers, 24 channels in 3 heads, 19 positions, 97 tokens
    CKPT = work / "run" / "step_00000004.safetensors"
    train_gpt("--layers", 3, "--heads", 3, "--channels", 24, "--seq_len", 19, "--vocab", 97, "--optimizer", "dmuon", "--lr", 0.02,
              "--steps", 4, "--out", work / "run")


def tearDownModule():
    temporary.cleanup()


def write_shard(path, tokens):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack(f"<256i{len(tokens)}H", 20240520, 1, len(tokens), *[0] * 253, *tokens))


def train_gpt(*flags, code=0):
    done = subprocess.run([BINARY, "--train", f"{shards}/train_*.bin", "--device", "cpu", "--batch", "4", *map(str, flags)],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout[-2000:] + done.stderr
    return done.stdout + done.stderr


def log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def our_loss(model, *flags):
    """The loss of a file's weights on the validation shard, whole windows: of a step that changes nothing."""
    out = Path(tempfile.mkdtemp(dir=work))
    train_gpt("--model", model, "--val", f"{shards}/val_*.bin", "--lr", 0, "--steps", 1, "--out", out, *flags)
    return log(out)[0]["val_loss"]


def read_safetensors(path):
    """(header, name -> bytes), by the description of the format alone."""
    content = path.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:begin])
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"}
    assert begin + max(last for _, last in offsets.values()) == len(content)
    return header, {name: content[begin + first:begin + last] for name, (first, last) in offsets.items()}


def hf(*arguments, code=0):
    done = subprocess.run([sys.executable, ROOT / "scripts/hf.py", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert code == 0 or len(done.stderr.splitlines()) == 1, done.stderr
    return done.stdout + done.stderr


class Files(unittest.TestCase):
    def test_a_checkpoint_by_the_description_of_the_format(self):
        content = CKPT.read_bytes()
        header, tensors = read_safetensors(CKPT)
        begin = 8 + struct.unpack("<Q", content[:8])[0]
        self.assertEqual(begin % 64, 0)
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        self.assertEqual(content[8:begin], text + b" " * (begin - 8 - len(text)))  # sorted, compact, filled up with spaces
        metadata = header.pop("__metadata__")
        for key, value in {"format": "train_gpt", "step": "4", "layers": "3", "heads": "3", "channels": "24", "seq_len": "19",
                           "vocab": "97", "optimizer": "dmuon", "optimizer_steps": "4", "flag.lr": "0.02", "tokenizer": "",
                           "seed": "1337", "total_batch": str(4 * 19)}.items():
            self.assertEqual(metadata[key], value, key)
        self.assertEqual({key[len("checksum."):] for key in metadata if key.startswith("checksum.")}, set(tensors))
        at = 0
        for name, tensor in header.items():  # in the order of the file
            self.assertEqual(tensor["dtype"], "F32")
            self.assertEqual(tensor["data_offsets"], [at, at + 4 * math.prod(tensor["shape"])], name)
            at = tensor["data_offsets"][1]
        weights = {name for name in header if not name.startswith("optimizer.")}
        self.assertEqual(len(weights), 4 + 12 * 3)
        self.assertEqual({name for name in header if name.startswith("optimizer.momentum.")},
                         {"optimizer.momentum." + name for name in weights if name.endswith((".c_attn.weight", ".c_proj.weight",
                                                                                            ".c_fc.weight"))})
        self.assertEqual(header["wte.weight"]["shape"], [97, 24])
        self.assertEqual(header["h.2.mlp.c_fc.weight"]["shape"], [96, 24])
        self.assertEqual(header["h.0.ln_1.bias"]["shape"], [24])
        # Initial weights that nothing has changed: the values are where they should be.
        train_gpt("--layers", 1, "--heads", 1, "--channels", 64, "--seq_len", 32, "--vocab", 97, "--lr", 0, "--steps", 1, "--out",
                  work / "initial")
        _, tensors = read_safetensors(work / "initial" / "step_00000001.safetensors")
        floats = {name: struct.unpack(f"<{len(data) // 4}f", data) for name, data in tensors.items()}
        self.assertEqual(set(floats["ln_f.weight"]) | set(floats["h.0.ln_2.weight"]), {1.0})
        self.assertEqual(set(floats["ln_f.bias"]) | set(floats["h.0.attn.c_attn.bias"]), {0.0})
        for name, deviation in (("wte.weight", 0.02), ("h.0.mlp.c_fc.weight", 0.02), ("h.0.mlp.c_proj.weight", 0.02 / math.sqrt(2))):
            mean_square = sum(x * x for x in floats[name]) / len(floats[name])
            self.assertAlmostEqual(math.sqrt(mean_square) / deviation, 1, delta=0.05)  # 6,208 and more: sigma is 1%

    @needs("safetensors", "numpy")
    def test_the_package_safetensors_opens_a_checkpoint(self):
        from safetensors import safe_open
        header, tensors = read_safetensors(CKPT)
        with safe_open(CKPT, framework="numpy") as file:
            self.assertEqual(file.metadata(), header["__metadata__"])
            self.assertEqual(set(file.keys()), set(tensors))
            for name in file.keys():
                values = file.get_tensor(name)
                self.assertEqual((list(values.shape), values.dtype.name), (header[name]["shape"], "float32"))
                self.assertTrue(values.tobytes() == tensors[name], name)

    @needs("safetensors", "numpy")
    def test_what_the_package_saves_is_refused_in_one_line(self):
        from safetensors.numpy import load_file, save_file
        header, _ = read_safetensors(CKPT)
        for metadata, words in ((None, "hf.py import"), ({"format": "pt"}, "hf.py import"), (header["__metadata__"], "damaged")):
            save_file(load_file(CKPT), work / "resaved.safetensors", metadata)
            said = train_gpt("--model", work / "resaved.safetensors", "--steps", 1, code=1)
            self.assertIn("resaved.safetensors", said)
            self.assertIn(words, said)
            self.assertEqual(len(said.splitlines()), 1)


@needs(*OURS)
class Convert(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(dir=work))

    def same(self, a, b):
        self.assertEqual(a.keys(), b.keys())
        for name in a:
            self.assertTrue(a[name] == b[name], name)  # assertEqual would take minutes over the differences

    def exported(self, checkpoint=None):
        hf("export", checkpoint or CKPT, self.dir / "model")
        return self.dir / "model"

    def test_there_and_back_bit_for_bit(self):
        model = self.exported()
        hf("import", model, self.dir / "back.safetensors")
        os.mkfifo(self.dir / "fifo")
        self.assertIn("is there, and not a file", hf("import", model, self.dir / "fifo", code=1))
        hf("import", model / "model.safetensors", self.dir / "again.safetensors")
        self.assertTrue((self.dir / "back.safetensors").read_bytes() == (self.dir / "again.safetensors").read_bytes())
        header, before = read_safetensors(CKPT)
        header_back, back = read_safetensors(self.dir / "back.safetensors")
        self.same(back, {name: data for name, data in before.items() if not name.startswith("optimizer.")})
        self.assertEqual({name: header_back[name]["shape"] for name in back}, {name: header[name]["shape"] for name in back})
        # And train_gpt takes it for what it is: weights.
        self.assertEqual(our_loss(self.dir / "back.safetensors"), our_loss(CKPT))
        self.assertIn("--model", train_gpt("--resume", self.dir / "back.safetensors", "--layers", 3, "--heads", 3, "--channels", 24,
                                           "--seq_len", 19, "--vocab", 97, "--steps", 1, code=1))
        shutil.copytree(shards, self.dir / "bytes")  # tokens of another meaning, whose number gives it away
        tokenizer = struct.pack("<256i", 20240328, 2, 256, 10, *[0] * 252) + b"".join(bytes([1, i]) for i in range(256))
        (self.dir / "bytes" / "tokenizer.bin").write_bytes(tokenizer)
        said = train_gpt("--model", self.dir / "back.safetensors", "--train", self.dir / "bytes/train_*.bin", "--steps", 1, code=1)
        self.assertIn("a vocabulary of 97 is smaller than the 256 tokens", said)
        (self.dir / "bytes" / "tokenizer.bin").write_bytes(struct.pack("<256i", 20240328, 2, 60, 10, *[0] * 252) + b"\1a" * 60)
        said = train_gpt("--model", self.dir / "back.safetensors", "--train", self.dir / "bytes/train_*.bin", "--steps", 1)
        self.assertIn("are for 97 tokens, and the tokenizer beside the shards has 60", said)
        hf("export", self.dir / "back.safetensors", self.dir / "once_more")
        self.assertTrue((self.dir / "once_more" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes())

    def test_a_model_of_bytes_brings_its_tokenizer(self):
        self.assertFalse((self.exported() / "tokenizer.json").exists())
        (self.dir / "text.txt").write_text("No more than a few words.\n" * 100)
        subprocess.run([sys.executable, ROOT / "scripts/data.py", f"text:{self.dir}/text.txt", "--out", self.dir / "data"], check=True,
                       capture_output=True)
        train_gpt("--train", self.dir / "data/train_*.bin", "--layers", 1, "--heads", 1, "--channels", 8, "--seq_len", 8, "--steps", 1,
                  "--out", self.dir / "run")
        hf("export", self.dir / "run/step_00000001.safetensors", self.dir / "bytes")
        letters = json.loads((self.dir / "bytes/tokenizer.json").read_text())["model"]["vocab"]
        self.assertEqual(sorted(letters.values()), list(range(256)))
        self.assertEqual((letters["A"], letters["\u0120"], letters["\u010a"]), (65, 32, 10))  # GPT-2's letters for space and newline
        self.assertIn("Tokens are bytes", (self.dir / "bytes/README.md").read_text())

    def test_matrices_are_transposed(self):
        header, theirs = read_safetensors(self.exported() / "model.safetensors")
        _, ours = read_safetensors(CKPT)
        self.assertEqual(header["__metadata__"], {"format": "pt"})
        for name, rows, columns in (("h.1.attn.c_attn.weight", 72, 24), ("h.2.mlp.c_proj.weight", 24, 96), ("wte.weight", None, 24)):
            there = struct.unpack(f"<{len(theirs['transformer.' + name]) // 4}f", theirs["transformer." + name])
            here = struct.unpack(f"<{len(ours[name]) // 4}f", ours[name])
            expected = here if rows is None else tuple(here[r * columns + c] for c in range(columns) for r in range(rows))
            self.assertTrue(there == expected, name)

    def test_other_ways_to_keep_the_same_weights(self):
        """No prefix, masks, a head beside the embedding, several files; and 16-bit types, to their precision."""
        import numpy
        model = self.exported()
        header, tensors = read_safetensors(model / "model.safetensors")
        hf("import", model, self.dir / "expected.safetensors")
        tensors = {name[len("transformer."):]: (header[name]["shape"], data) for name, data in tensors.items()}
        tensors |= {f"h.{i}.attn.bias": ([1, 1, 2, 2], bytes(16)) for i in range(3)}

        def save(path, names, dtype="F32", convert=bytes):
            entries, data = {}, b""
            for name in names:
                raw = convert(tensors[name][1])
                entries[name] = {"dtype": dtype, "shape": tensors[name][0], "data_offsets": [len(data), len(data) + len(raw)]}
                data += raw
            text = json.dumps(entries).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)

        def imported():
            hf("import", model, self.dir / "got.safetensors")
            return (self.dir / "got.safetensors").read_bytes()

        expected = (self.dir / "expected.safetensors").read_bytes()
        save(model / "model.safetensors", tensors)
        self.assertTrue(imported() == expected)
        tensors["lm_head.weight"] = tensors["wte.weight"]
        names = sorted(tensors)
        save(model / "one.safetensors", names[:20])
        save(model / "two.safetensors", names[20:])
        (model / "model.safetensors").unlink()
        index = {name: "one.safetensors" if name in names[:20] else "two.safetensors" for name in names}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        self.assertTrue(imported() == expected)
        (model / "model.safetensors.index.json").unlink()
        weights = read_safetensors(self.dir / "expected.safetensors")[1]
        cut = {"F16": lambda raw: numpy.frombuffer(raw, "<f4").astype("<f2").tobytes(),
               "BF16": lambda raw: (numpy.frombuffer(raw, "<u4") >> 16).astype("<u2").tobytes()}
        for dtype, bound in (("F16", 2 ** -11), ("BF16", 2 ** -7)):  # to nearest; cut off
            save(model / "model.safetensors", names, dtype, cut[dtype])
            imported()
            for name, data in read_safetensors(self.dir / "got.safetensors")[1].items():
                want, got = numpy.frombuffer(weights[name], "<f4"), numpy.frombuffer(data, "<f4")
                self.assertLessEqual(numpy.abs(got - want).max(), bound * numpy.abs(want).max() + 2 ** -25, f"{dtype} {name}")
        save(model / "model.safetensors", names, "F64", lambda raw: raw * 2)
        self.assertIn("type F64", hf("import", model, self.dir / "x", code=1))

    def test_models_that_are_not_computed_here_are_refused_by_name(self):
        model = self.exported()
        good = json.loads((model / "config.json").read_text())
        for change, words in (({"activation_function": "relu"}, ("activation_function", "relu", "gelu_new")),
                              ({"activation_function": "gelu"}, ("activation_function", '"gelu"')),
                              ({"n_inner": 100}, ("n_inner", "96")),
                              ({"layer_norm_epsilon": 1e-6}, ("layer_norm_epsilon",)),
                              ({"scale_attn_weights": False}, ("scale_attn_weights",)),
                              ({"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx",)),
                              ({"add_cross_attention": True}, ("add_cross_attention",)),
                              ({"tie_word_embeddings": False}, ("tie_word_embeddings",)),
                              ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
                              ({"model_type": "llama"}, ("model_type", "llama")),
                              ({"n_head": 5}, ("n_embd 24", "n_head 5")), ({"n_head": 0}, ("n_head 0",)),
                              ({"n_layer": "3"}, ("n_layer",)), ({"n_positions": 18}, ("wpe.weight", "(19, 24)")),
                              ({"n_layer": 2}, ("h.2.attn.c_attn.bias",)), ({"n_layer": 4}, ("no tensor h.3.",)),
                              ({"vocab_size": 98}, ("wte.weight",))):
            (model / "config.json").write_text(json.dumps({**good, **change}))
            said = hf("import", model, self.dir / "x.safetensors", code=1)
            for word in words:
                self.assertIn(word, said)
        for text, words in (("{", "config.json"), ("[]", "config.json"), ('{"model_type": "gpt2"}', "n_layer")):
            (model / "config.json").write_text(text)
            self.assertIn(words, hf("import", model, self.dir / "x.safetensors", code=1))
        (model / "config.json").unlink()
        self.assertIn("config.json", hf("import", model, self.dir / "x.safetensors", code=1))
        self.assertFalse((self.dir / "x.safetensors").exists())

    def test_bad_files_end_in_one_line(self):
        model, bad = self.exported(), self.dir / "bad.safetensors"
        content = (model / "model.safetensors").read_bytes()
        headers = ["[]", '{"a":{}}', "[" * 90000, '{"__metadata__":[]}']
        for place in ('"shape":[-1],"data_offsets":[0,0]', '"shape":1,"data_offsets":[0,0]', '"shape":[1.5],"data_offsets":[0,0]',
                      '"shape":[1],"data_offsets":[1,0]', '"shape":[1],"data_offsets":[0]'):
            headers.append(f'{{"transformer.wte.weight":{{"dtype":"F32",{place}}}}}')
        for damaged in (b"", content[:5], content[:1000], content[:-1], content + b"x", b"\xff" * 1000,
                        *(struct.pack("<Q", len(header)) + header.encode() for header in headers)):
            (model / "model.safetensors").write_bytes(damaged)
            self.assertIn("model.safetensors", hf("import", model, self.dir / "x", code=1))
        for change, words in (({"dtype": []}, "type []"), ({"data_offsets": [0, 0]}, "has 0 bytes for 24 elements")):
            (model / "model.safetensors").write_bytes(content)
            entries, tensors = read_safetensors(model / "model.safetensors")
            entries["transformer.h.0.ln_1.bias"].update(change)
            text = json.dumps(entries).encode()
            (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))
            self.assertIn(words, hf("import", model, self.dir / "x", code=1))
        (model / "model.safetensors").unlink()
        self.assertIn("no model.safetensors", hf("import", model, self.dir / "x", code=1))
        content = CKPT.read_bytes()
        for at in (0, 5, 12, 300, 2000, len(content) // 2, len(content) - 1):
            bad.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
            self.assertIn("bad.safetensors", hf("export", bad, self.dir / "y", code=1))
        bad.write_bytes(content.replace(b'"step":"4"', b'"step":"5"'))
        self.assertIn("its header has changed", hf("export", bad, self.dir / "y", code=1))
        bad.write_bytes(b"TRAINGPT" + bytes(100))
        self.assertIn("earlier version", hf("export", bad, self.dir / "y", code=1))
        self.assertIn("nowhere", hf("export", self.dir / "nowhere", self.dir / "y", code=1))
        os.mkfifo(self.dir / "fifo")
        self.assertIn("is not a file", hf("export", self.dir / "fifo", self.dir / "y", code=1))
        self.assertIn("cannot", hf("export", CKPT, CKPT / "below", code=1).replace("Not a directory", "cannot"))
        self.assertFalse((self.dir / "y").exists())

    def test_a_name_that_cannot_be_had(self):
        said = hf("import", "no-such-owner/no-such-model", self.dir / "x", code=1)
        self.assertIn("no-such-owner/no-such-model", said)


@needs(*OURS, "torch", "transformers")
class Transformers(unittest.TestCase):
    """The same weights, the same tokens, fp32 on both sides: losses agree to 1e-5 of themselves. A loss is a mean of
    log-probabilities, logsumexp(logits) - logit[token]; the weights are ten times those of initialisation, so that what
    is a little wrong anywhere shows, and the lengths are such that single positions can be told apart."""
    BOUND = 1e-5  # fp32 sums of a few hundred terms in another order; measured: 3e-8 to 2e-7

    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(dir=work))
        global torch, transformers
        import torch
        import transformers
        torch.manual_seed(1)

    def windows(self, length):
        tokens = torch.tensor(struct.unpack("<65H", (shards / "val_000.bin").read_bytes()[1024:]))
        count = (len(tokens) - 1) // length
        return torch.stack([tokens[i * length:(i + 1) * length + 1] for i in range(count)])

    def their_loss(self, model, length):
        windows = self.windows(length)
        with torch.no_grad():
            logits = model.eval()(windows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1)).item()

    def check_losses(self, model, file):
        for length in (1, 2, 3, 7, 19):
            theirs, ours = self.their_loss(model, length), our_loss(file, "--seq_len", length)
            print(f"\n    {length} positions: theirs {theirs:.7f}, ours {ours:.7f}, off by {abs(ours - theirs) / theirs:.1e}", end="")
            self.assertLess(abs(ours - theirs), self.BOUND * theirs)

    def random_model(self, **changes):
        config = {"n_layer": 3, "n_head": 3, "n_embd": 24, "n_positions": 19, "vocab_size": 97, "bos_token_id": None,
                  "eos_token_id": None, **changes}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1 if "ln_" in name and name.endswith("weight") else 0))
        return model

    def test_theirs_here(self):
        model = self.random_model()
        model.save_pretrained(self.dir)
        hf("import", self.dir, self.dir / "ours.safetensors")
        self.check_losses(model, self.dir / "ours.safetensors")

    def test_ours_there(self):
        source = self.random_model()  # ours, of random biases too, by way of a step of training
        source.save_pretrained(self.dir / "source")
        hf("import", self.dir / "source", self.dir / "source.safetensors")
        train_gpt("--model", self.dir / "source.safetensors", "--optimizer", "dmuon", "--lr", 0.01, "--steps", 5, "--out", self.dir / "run")
        hf("export", self.dir / "run" / "step_00000005.safetensors", self.dir / "model")
        model, info = transformers.GPT2LMHeadModel.from_pretrained(self.dir / "model", output_loading_info=True)
        self.assertFalse(any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info)
        self.check_losses(model, self.dir / "run" / "step_00000005.safetensors")
        self.assertGreater(abs(self.their_loss(source, 19) / self.their_loss(model, 19) - 1), 0.01)  # it was trained

    def test_a_tiny_gpt2_of_theirs_trains_here(self):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=19, vocab_size=97,
                                                                     bos_token_id=None, eos_token_id=None))
        model.save_pretrained(self.dir)
        hf("import", self.dir, self.dir / "tiny.safetensors")
        start = self.their_loss(model, 19)
        self.assertLess(abs(our_loss(self.dir / "tiny.safetensors") - start), self.BOUND * start)
        out = self.dir / "run"
        train_gpt("--model", self.dir / "tiny.safetensors", "--val", f"{shards}/val_*.bin", "--lr", 0.003, "--steps", 60, "--batch", 16,
                  "--out", out)
        losses = [entry["loss"] for entry in log(out)]
        held_out = log(out)[-1]["val_loss"]
        print(f"\n    {start:.4f} at the start; after 60 steps {losses[-1]:.4f}, on held-out tokens {held_out:.4f}", end="")
        self.assertAlmostEqual(losses[0], start, delta=0.2)  # on other tokens, hundreds of them
        # Half of the tokens are 0, the rest any of 97: whoever knows that much has 2.96 (0.69 bits of which kind, half of ln 97).
        self.assertLess(losses[-1], 3.4)
        self.assertLess(held_out, 3.4)

    def test_bytes_are_tokens_there_too(self):
        model = self.dir / "model"
        model.mkdir()
        sys.path.insert(0, str(ROOT / "scripts"))
        import hf as script
        for name, content in {**script.byte_tokenizer(), "config.json": {"model_type": "gpt2"}}.items():
            (model / name).write_text(json.dumps(content))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        for text in ("Na\u00efve \n\t  \u6f22\u5b57 \x00\x7f <|endoftext|> don't", "".join(map(chr, range(1, 0x800)))):
            self.assertEqual(tokenizer.encode(text), list(text.encode()))
            self.assertEqual(tokenizer.decode(list(text.encode())), text)

    def test_the_sizes_of_gpt2(self):
        """The configurations of the released models are taken: what is missing is named only after them."""
        for layers, heads, channels in ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)):
            transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=channels).save_pretrained(self.dir)
            (self.dir / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
            self.assertIn("no tensor wte.weight", hf("import", self.dir, self.dir / "x", code=1))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: test_hf.py BINARY")
    if not have(*OURS) and VENV.exists() and not Path(sys.prefix).samefile(VENV.parent.parent):
        os.execv(VENV, [str(VENV), *sys.argv])
    BINARY = str(Path(sys.argv[1]).resolve())
    tests = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    if sys.argv[2:]:
        tests = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[2:], sys.modules[__name__])
    result = unittest.TextTestRunner(verbosity=2).run(tests)
    bad = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - bad - len(result.skipped)} passed, {bad} failed, {len(result.skipped)} skipped")
    sys.exit(bad > 0)
