#!/usr/bin/env python3
"""Compiler launcher for nvcc: cuda_compile.py [CCACHE] NVCC ARGS...

Runs the compiler, takes the lines of `ptxas -v` out of its messages and keeps them in OBJECT.ptxas, where
scripts/cuda_resources.py finds them. Everything else is passed on, exit status included.
"""
import os
import re
import subprocess
import sys

PTXAS = re.compile(r"^(ptxas info\s|\s+\d+ bytes stack frame|\s*Function properties for )")


def main() -> int:
    command = sys.argv[1:]
    # ccache's preprocessed mode sees one architecture only; depend mode hashes the files themselves.
    environment = dict(os.environ, CCACHE_DEPEND="1")
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    kept, other = [], []
    for line in done.stderr.splitlines():
        (kept if PTXAS.match(line) else other).append(line)
    if other:
        print("\n".join(other), file=sys.stderr)
    if "-o" in command and "-c" in command and done.returncode == 0:
        with open(command[command.index("-o") + 1] + ".ptxas", "w") as out:
            out.write("\n".join(kept) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
