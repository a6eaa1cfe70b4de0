#!/usr/bin/env python3
"""Puts the tables of a results folder into README.md, between its markers, as `v3bench table` renders them.

usage: scripts/readme_tables.py DIR [--v3bench build/release/v3bench]
A marker pair looks like:  <!-- table: kv_cache.csv --> ... <!-- end -->
(`bench.csv peers`: its table of ours against the peers.) `<!-- machine -->` ... `<!-- end -->` is filled from DIR/machine.json. Nothing is typed by hand.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--v3bench", default="build/release/v3bench")
    args = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    readme = root / "README.md"
    text = readme.read_text()

    def table(match: re.Match) -> str:
        name, _, form = match.group(1).partition(" ")
        csv = args.dir / name
        if not csv.exists():
            sys.exit(f"readme_tables: {csv} does not exist")
        done = subprocess.run([args.v3bench, "table", str(csv)] + ([f"--{form}"] if form else []), text=True, capture_output=True)
        if done.returncode != 0:
            sys.exit(f"readme_tables: {done.stderr.strip()}")
        return f"<!-- table: {match.group(1)} -->\n{done.stdout.strip()}\n<!-- end -->"

    def machine(_: re.Match) -> str:
        card = json.loads((args.dir / "machine.json").read_text())
        return "<!-- machine -->\n```json\n" + json.dumps(card, indent=1) + "\n```\n<!-- end -->"

    text = re.sub(r"<!-- table: (\S+(?: \w+)?) -->.*?<!-- end -->", table, text, flags=re.S)
    text = re.sub(r"<!-- machine -->.*?<!-- end -->", machine, text, flags=re.S)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
