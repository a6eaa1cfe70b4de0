#!/usr/bin/env python3
"""Tests of the peer scripts that need no network and no peer: python3 scripts/peers/selftest.py
The export is tested where numpy is (the peers' environment); the last line says how many tests ran.
"""

import csv
import json
import math
import struct
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.dont_write_bytecode = True
import run  # noqa: E402
import worker  # noqa: E402

TINY = HERE.parent.parent / "model/tiny-v3"
try:
    import numpy
except ImportError:
    numpy = None


class Logits(unittest.TestCase):
    def file(self, rows):
        path = Path(tempfile.mkdtemp()) / "x.npy"
        worker.write_npy(str(path), rows)
        return run.read_npy(path)

    def test_npy_round_trip(self):
        shape, values = self.file([[1.0, 2.5, -3.0], [4.0, 5.0, 6.0]])
        self.assertEqual(shape, (2, 3))
        self.assertEqual(list(values), [1.0, 2.5, -3.0, 4.0, 5.0, 6.0])

    def test_agreement(self):
        a = self.file([[1.0, 2.0], [2.0, 1.0]])
        rel, top = run.disagreement(a, a)
        self.assertEqual((rel, top), (0.0, 1.0))
        rel, top = run.disagreement(a, self.file([[1.0, 2.0], [1.0, 2.0]]))
        self.assertAlmostEqual(rel, math.sqrt(2 / 10))
        self.assertEqual(top, 0.5)

    def test_nan_and_other_shapes_never_agree(self):
        a = self.file([[1.0, 2.0]])
        for b in ([[float("nan"), 2.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0, 3.0]]):
            rel, _ = run.disagreement(a, self.file(b))
            self.assertFalse(rel <= run.TOLERANCE)


class Peers(unittest.TestCase):
    def test_a_peer_that_disagrees_is_failed_and_one_that_dies_is_unsupported(self):
        scratch = tempfile.mkdtemp()
        w = run.Worker(sys.executable, "echo", TINY, 1, 64, scratch)
        self.addCleanup(w.close)
        self.assertEqual(w.what, "echo")
        ids = [1, 2, 3]
        got = w.ask(do="logits", ids=ids)
        mine = run.read_npy(got["logits"])
        self.assertEqual(run.check_peer(w, ids, mine)[0], "passed")
        wrong = (mine[0], [v * 1.2 for v in mine[1]])
        self.assertEqual(run.check_peer(w, ids, wrong)[0], "failed")
        got = w.ask(do="time", ids=[[1, 2, 3]], T=1, seconds=0.01)
        self.assertGreater(len(got["samples_us"]), 0)
        self.assertIn("error", w.ask(do="logits", ids=["no number"]))
        gone = run.Worker(sys.executable, "echo", HERE / "no such folder", 1, 64, scratch)
        self.addCleanup(gone.close)
        self.assertEqual(run.check_peer(gone, ids, mine)[0], "unsupported")


class Rows(unittest.TestCase):
    def test_cases(self):
        self.assertEqual(run.parse_cases("decode:8:1024,prefill:1:64"),
                         [{"op": "forward_decode", "B": 8, "T": 1, "s0": 1024},
                          {"op": "forward_prefill", "B": 1, "T": 64, "s0": 0}])
        for bad in ("decode:8", "train:1:1", "decode:0:5", "decode:a:5"):
            with self.assertRaises(SystemExit):
                run.parse_cases(bad)

    def test_quartiles(self):
        q = run.quartiles([5.0, 1.0, 3.0, 2.0, 4.0])
        self.assertEqual((q["min_us"], q["q1_us"], q["median_us"], q["q3_us"], q["samples"]), (1.0, 2.0, 3.0, 4.0, 5))

    def test_append_replaces_the_same_rows_only(self):
        out = Path(tempfile.mkdtemp())
        row = lambda impl, us: {"impl": impl, "case": "c", "median_us": us}  # noqa: E731
        run.write(out, ["impl", "case", "median_us"], [row("a", 1), row("b", 2)], False)
        run.write(out, ["impl", "case", "median_us"], [row("b", 3)], True)
        with open(out / "bench.csv", newline="") as f:
            self.assertEqual([(r["impl"], r["median_us"]) for r in csv.DictReader(f)], [("a", "1"), ("b", "3")])


@unittest.skipIf(numpy is None, "numpy is in the peers' environment only")
class Export(unittest.TestCase):
    def setUp(self):
        import export_model

        self.export = export_model
        self.config = json.loads((TINY / "config.json").read_text())
        self.tensors = export_model.read_checkpoint(TINY)

    def test_hugging_face_folder_has_the_same_bits_and_no_mtp(self):
        out = Path(tempfile.mkdtemp())
        self.export.write_hf(self.config, self.tensors, out, 1000)
        back = self.export.read_checkpoint(out)
        for name, (dtype, a) in back.items():
            self.assertEqual(dtype, self.tensors[name][0])
            self.assertEqual(a.tobytes(), self.tensors[name][1].tobytes())
        mtp = f"model.layers.{self.config['num_hidden_layers']}."
        self.assertEqual(sorted(back), sorted(n for n in self.tensors if not n.startswith(mtp)))
        self.assertEqual(json.loads((out / "config.json").read_text())["max_position_embeddings"], 1000)

    def test_gguf_tensors(self):
        c, by = self.config, {}
        for name, kind, a in self.export.gguf_tensors(c, self.tensors):
            self.assertNotIn(name, by)
            by[name] = (kind, a)
        h, dn, dv, dc = (c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))
        self.assertEqual(by["blk.0.attn_k_b.weight"][1].shape, (h, dc, dn))
        self.assertEqual(by["blk.0.attn_v_b.weight"][1].shape, (h, dv, dc))
        kv_b = self.tensors["model.layers.0.self_attn.kv_b_proj.weight"][1]
        self.assertEqual(by["blk.0.attn_k_b.weight"][1][1, 5, 7], kv_b[(dn + dv) + 7, 5])
        self.assertEqual(by["blk.0.attn_v_b.weight"][1][1, 7, 5], kv_b[(dn + dv) + dn + 7, 5])
        self.assertEqual(by["blk.1.ffn_gate_exps.weight"][1].shape[0], c["n_routed_experts"])
        self.assertEqual(by["blk.1.exp_probs_b.bias"][0], "f32")

    def test_rounding_to_bf16_is_to_nearest_even(self):
        a = numpy.array([1.0, 1.00390625, 1.01171875, -2.5], dtype=numpy.float32)
        tensors = {"model.embed_tokens.weight": ("F32", a), "model.norm.weight": ("F32", a), "lm_head.weight": ("F32", a)}
        got = dict((n, v) for n, _, v in self.export.gguf_tensors(dict(self.config, num_hidden_layers=0), tensors))
        wide = self.export.widen("BF16", got["token_embd.weight"])
        self.assertEqual(list(wide), [1.0, 1.0, 1.015625, -2.5])
        self.assertEqual(struct.pack("<f", wide[3]), struct.pack("<f", -2.5))


if __name__ == "__main__":
    unittest.main(verbosity=1)
