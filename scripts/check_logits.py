#!/usr/bin/env python3
"""Compares logits that v3bench wrote with Hugging Face transformers on the same checkpoint and tokens.

    v3bench logits --model DIR --tokens FILE --backend reference --dtype f64 --out mine.npy
    python scripts/check_logits.py --model DIR --tokens FILE --npy mine.npy [--dtype f64] [--tolerance 1e-5]

Prints max abs error, relative Frobenius error, top-1 agreement. Exit code 0 when the relative Frobenius
error is within --tolerance (default 1e-5 for f64 and f32, 3e-2 for bf16), 1 when not, 2 for bad input.
--dtype is the precision transformers computes in; f64 needs 8 bytes a parameter. --router-mask zero
repeats what transformers 4 did; --fp8-dequant exact skips the rounding of dequantised weights to bf16.
Needs: torch, transformers >= 5.23, safetensors, numpy (tests/goldens/README.md has the commands).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def fail(message):
    print(message, file=sys.stderr)
    sys.exit(2)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--tokens", type=Path, required=True)
    ap.add_argument("--npy", type=Path, required=True)
    ap.add_argument("--dtype", choices=["f64", "f32", "bf16"], default="f64")
    ap.add_argument("--tolerance", type=float)
    ap.add_argument("--router-mask", choices=["neg_inf", "zero"], default="neg_inf")
    ap.add_argument("--fp8-dequant", choices=["bf16", "exact"], default="bf16")
    a = ap.parse_args()
    tolerance = a.tolerance if a.tolerance is not None else (3e-2 if a.dtype == "bf16" else 1e-5)

    import numpy as np

    try:
        ids = [int(x) for x in a.tokens.read_text().replace(",", " ").split()]
        mine = np.load(a.npy)
    except (OSError, ValueError) as e:
        fail(f"check_logits: {e}")
    if not (a.model / "config.json").exists():
        fail(f"{a.model}/config.json: not found")

    import hf_reference as hf

    model = hf.load(a.model, a.dtype, mask_zero=a.router_mask == "zero",
                    fp8_round="bf16" if a.fp8_dequant == "bf16" else "none")
    vocab = model.config.vocab_size
    if not ids or min(ids) < 0 or max(ids) >= vocab:
        fail(f"{a.tokens}: token ids must be in [0, {vocab})")
    tensors, margin = hf.forward(model, ids)
    hf.close(model)
    theirs = tensors["logits"].double().numpy()
    if mine.shape != theirs.shape:
        fail(f"{a.npy}: shape {list(mine.shape)}, expected {list(theirs.shape)}")
    mine = mine.astype(np.float64)
    error = np.abs(mine - theirs)
    rel = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    top1 = float((mine.argmax(-1) == theirs.argmax(-1)).mean())
    print(f"transformers {hf.transformers.__version__}, torch {hf.torch.__version__}, dtype {a.dtype}, "
          f"router mask {a.router_mask}")
    print(f"tokens {len(ids)}, vocabulary {vocab}")
    print(f"max abs error        {error.max():.6e}  (row {int(np.unravel_index(error.argmax(), error.shape)[0])})")
    print(f"relative Frobenius   {rel:.6e}  (tolerance {tolerance:g})")
    print(f"top-1 agreement      {top1:.4f}")
    print(f"nearest router tie   {margin:.3e}  (a gap below the error can route a token differently)")
    good = bool(rel <= tolerance)  # NaN fails
    print("PASS" if good else "FAIL")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
