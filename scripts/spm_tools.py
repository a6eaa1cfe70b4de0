#!/usr/bin/env python3
"""Helpers of train_tokenizer.sh: SentencePiece's trainer reads line by line and so never sees a newline.

  spm_tools.py sample CORPUS_DIR OUT [FRACTION]   writes a sample of the train split, newlines inside a
                                                  chunk as U+2424, one chunk a line
  spm_tools.py newline MODEL                      turns U+2424 in the pieces of MODEL back into newlines
  spm_tools.py config MODEL OUT_DIR               writes tokenizer_config.json beside it

Python 3.11 standard library only; the model file is the protocol buffer `sentencepiece.ModelProto`.
"""
import hashlib
import json
import os
import sys

MARK = "\u2424"
CHUNK = 3000  # bytes; chunks end at line ends


def sample(corpus, out, fraction):
    with open(os.path.join(corpus, "train.txt"), "rb") as f:
        data = f.read()
    if MARK.encode() in data:
        data = data.replace(MARK.encode(), b"")
    with open(os.path.join(corpus, "train.index.tsv"), encoding="utf-8") as f:
        rows = [line.rstrip("\n").split("\t") for line in f][1:]
    written = 0
    with open(out + ".tmp", "wb") as f:
        for doc_id, _, _, offset, length in rows:
            text = data[int(offset):int(offset) + int(length)]
            part, number = b"", 0
            for line in text.splitlines(keepends=True) + [None]:
                if line is not None and len(part) + len(line) <= CHUNK:
                    part += line
                    continue
                h = hashlib.sha256(f"{doc_id}:{number}".encode()).digest()
                if part and int.from_bytes(h[:4], "big") < fraction * 2**32:
                    f.write(part.replace(b"\n", MARK.encode()) + b"\n")
                    written += len(part)
                part, number = line or b"", number + 1
    os.replace(out + ".tmp", out)
    print(f"spm_tools: {written / 1e6:.1f} MB of train sampled into {out}")


def varint(buf, i):
    value = shift = 0
    while True:
        value |= (buf[i] & 127) << shift
        i += 1
        if buf[i - 1] < 128:
            return value, i
        shift += 7


def to_varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def fields(buf):
    """Yields (field number, wire type, raw value bytes or int) of a protocol buffer message."""
    i = 0
    while i < len(buf):
        key, i = varint(buf, i)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, i = varint(buf, i)
        elif wire == 2:
            n, i = varint(buf, i)
            value, i = buf[i:i + n], i + n
        elif wire in (1, 5):
            n = 8 if wire == 1 else 4
            value, i = buf[i:i + n], i + n
        else:
            sys.exit(f"spm_tools: wire type {wire} at byte {i}: expected 0, 1, 2 or 5")
        yield number, wire, value


def encode(number, wire, value):
    key = to_varint(number << 3 | wire)
    if wire == 0:
        return key + to_varint(value)
    return key + (to_varint(len(value)) if wire == 2 else b"") + value


def newline(path):
    with open(path, "rb") as f:
        data = f.read()
    out, changed = b"", 0
    for number, wire, value in fields(data):
        if number == 1 and MARK.encode() in value:  # ModelProto.pieces
            value = b"".join(encode(n, w, v.replace(MARK.encode(), b"\n") if n == 1 else v)
                             for n, w, v in fields(value))
            changed += 1
        out += encode(number, wire, value)
    if not changed:
        sys.exit(f"spm_tools: {path}: expected pieces with U+2424, found none")
    with open(path + ".tmp", "wb") as f:
        f.write(out)
    os.replace(path + ".tmp", path)
    print(f"spm_tools: {changed} pieces with newlines")


def config(model, out_dir):
    with open(model, "rb") as f:
        pieces = sum(n == 1 for n, _, _ in fields(f.read()))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True,
                "add_eos_token": False, "add_prefix_space": False, "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>", "pad_token": None, "clean_up_tokenization_spaces": False,
                "model_max_length": 512}
    with open(os.path.join(out_dir, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(settings, f, indent=1)
        f.write("\n")
    print(f"spm_tools: {pieces} pieces")


def main():
    a = sys.argv[1:]
    if len(a) in (3, 4) and a[0] == "sample":
        sample(a[1], a[2], float(a[3]) if len(a) == 4 else 0.2)
    elif len(a) == 2 and a[0] == "newline":
        newline(a[1])
    elif len(a) == 3 and a[0] == "config":
        config(a[1], a[2])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
