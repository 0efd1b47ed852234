#!/usr/bin/env python3
"""Writes one shard of 4 M uniform tokens below 2^15, as the figures of others were measured: random_tokens.py FILE"""
import os
import struct
import sys

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
n = 1 << 22
tokens = bytearray(os.urandom(2 * n))
tokens[1::2] = bytes(high & 127 for high in tokens[1::2])
os.makedirs(os.path.dirname(sys.argv[1]) or ".", exist_ok=True)
with open(sys.argv[1], "wb") as file:
    file.write(struct.pack("<256i", 20240520, 1, n, *[0] * 253) + tokens)
