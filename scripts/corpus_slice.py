#!/usr/bin/env python3
"""Copies a corpus with a slice of its train split: whole held-out and validation splits (what the scenarios score), and
every k-th training document up to --train-bytes.

usage: scripts/corpus_slice.py build/corpus OUT --train-bytes 6000000
"""
import argparse
import json
import pathlib
import shutil


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--train-bytes", type=int, default=6_000_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split in ("heldout", "validation"):
        for suffix in (".txt", ".index.tsv"):
            shutil.copyfile(args.corpus / (split + suffix), args.out / (split + suffix))
    text = (args.corpus / "train.txt").read_bytes()
    header, *lines = (args.corpus / "train.index.tsv").read_text().splitlines()
    step = max(1, -(-len(text) // args.train_bytes))
    offset = 0
    with open(args.out / "train.txt", "wb") as t, open(args.out / "train.index.tsv", "w") as index:
        index.write(header + "\n")
        for line in lines[::step]:
            *name, begin, length = line.split("\t")
            begin, length = int(begin), int(length)
            t.write(text[begin : begin + length])
            index.write("\t".join([*name, str(offset), str(length)]) + "\n")
            offset += length
    manifest = json.loads((args.corpus / "manifest.json").read_text())
    manifest["slice"] = {"train_every": step, "train_bytes": offset}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
