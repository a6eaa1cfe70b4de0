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
import models  # noqa: E402
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
            self.assertFalse(rel <= models.TRAINED_TOLERANCE)


class Peers(unittest.TestCase):
    def test_a_peer_that_disagrees_is_failed_and_one_that_dies_is_unsupported(self):
        scratch = tempfile.mkdtemp()
        w = run.Worker(sys.executable, "echo", TINY, 1, 64, scratch)
        self.addCleanup(w.close)
        self.assertEqual(w.what, "echo")
        ids = [1, 2, 3]
        got = w.ask(do="logits", ids=ids)
        mine = run.read_npy(got["logits"])
        self.assertEqual(run.check_peer(w, ids, mine, 0.06)[0], "passed")
        wrong = (mine[0], [v * 1.2 for v in mine[1]])
        self.assertEqual(run.check_peer(w, ids, wrong, 0.06)[0], "failed")
        got = w.ask(do="time", ids=[[1, 2, 3]], T=1, seconds=0.01)
        self.assertGreater(len(got["samples_us"]), 0)
        self.assertIn("error", w.ask(do="logits", ids=["no number"]))
        gone = run.Worker(sys.executable, "echo", HERE / "no such folder", 1, 64, scratch)
        self.addCleanup(gone.close)
        self.assertEqual(run.check_peer(gone, ids, mine, 0.06)[0], "unsupported")


class Rows(unittest.TestCase):
    def test_cases(self):
        self.assertEqual(models.parse_cases("decode:8:1024,prefill:1:64"),
                         [{"op": "forward_decode", "B": 8, "T": 1, "s0": 1024},
                          {"op": "forward_prefill", "B": 1, "T": 64, "s0": 0}])
        for bad in ("decode:8", "train:1:1", "decode:0:5", "decode:a:5"):
            with self.assertRaises(SystemExit):
                models.parse_cases(bad)

    def test_a_made_model_says_what_it_is(self):
        build = Path("/nowhere")
        m = models.Model("v2-lite:3", build)
        self.assertEqual((m.made, m.name, m.folder), (True, "v2-lite-3", build / "v2-lite-3/hf"))
        text = m.case_text({"B": 8, "T": 1, "s0": 1024})
        self.assertTrue(text.startswith("B=8,T=1,s0=1024,L=3,L_d=1,d=2048,"), text)
        self.assertTrue(text.endswith(",context=rows,weights=steered"), text)
        self.assertAlmostEqual(m.tolerance, 2 * 1.7e-3 * math.sqrt(7))
        self.assertEqual(m.why_not(1e12, 1e12), "")
        self.assertIn("memory", m.why_not(1e9, 1e12))
        self.assertIn("needs", m.why_not(1e12, 1e9))
        with self.assertRaises(SystemExit):
            models.Model("v2-lite:1", build)
        tiny = models.Model(str(TINY), build)
        self.assertEqual((tiny.made, tiny.folder, tiny.shape["V"], tiny.shape["m"]), (False, TINY, 4096, 80))
        # Two bytes an element of what is stored, but for the norms and biases.
        stored = (TINY / "model.safetensors").stat().st_size
        self.assertLess(tiny.bytes(), stored)
        self.assertGreater(tiny.bytes(), 0.6 * stored)  # the MTP module is the rest

    def test_tokens_are_those_of_the_bench(self):
        # As model/rng.h printed rng_below({1, 1}, i, 4096), i = 0 .. 7.
        got = models.tokens_of({"s0": 3, "T": 1, "B": 2}, 4096)
        self.assertEqual(got, [[1399, 1801, 1097, 1877], [486, 4004, 3031, 1582]])

    def rounds(self, made, verdicts):
        """The rows of one case after two rounds, with peers of these verdicts."""
        peers = []
        for name, verdict in verdicts.items():
            p = run.Peer(name, None, None, [0])
            p.what, p.verdict = name + " 1.0", verdict
            if verdict[0] == "passed":
                p.slices = [[[10.0, 20.0, 30.0], [40.0]]]
            peers.append(p)
        columns = ["schema_version", "run_id", "utc_time", "commit", "dirty", "machine", "device", "op", "impl",
                   "resolved_isa", "case", "params", "dtype", "status", "reason", "cache_state", "samples", "min_us",
                   "q1_us", "median_us", "q3_us", "flop", "bytes", "pct_of_roof", "roof", "repro"]
        row = dict.fromkeys(columns, "x")
        row.update(status="unchecked" if made else "passed", reason="none", flop="4e6", bytes="2e6", min_us="5", q1_us="6",
                   q3_us="9", samples="3", params="seed=1")
        ours = [dict(row, median_us="8", pct_of_roof="50"), dict(row, median_us="6", pct_of_roof="50")]
        model = models.Model("steered" if made else str(TINY), Path("/nowhere"))
        args = type("Args", (), {"rounds": 2, "seconds": 1, "threads": 2, "beside": 1, "outputs": "last"})
        case = {"op": "forward_decode", "B": 1, "T": 1, "s0": 64}
        return run.case_rows(args, model, case, ours, peers, 0, made, columns)

    def test_rows_of_a_case(self):
        agrees, differs, absent = ("passed", "same", 1e-3), ("failed", "others", 0.5), ("unsupported", "not there", None)
        ours, one, two = self.rounds(False, {"transformers": agrees, "llamacpp": absent})
        self.assertEqual((ours["status"], ours["median_us"], ours["samples"], ours["pct_of_roof"]), ("passed", 7.0, 6, 100 * 3 / 7))
        self.assertEqual((one["impl"], one["status"], one["samples"], one["min_us"]),
                         ("forward_decode.cpu_transformers", "passed", 4, 10.0))
        self.assertEqual(one["median_us"], 30.0)
        self.assertAlmostEqual(one["pct_of_roof"], 100 * 3 / 30)
        self.assertEqual((two["status"], two["reason"], two["median_us"]), ("unsupported", "not there", ""))

    def test_ours_without_a_reference_stands_with_the_peers(self):
        agrees, differs, absent = ("passed", "same", 1e-3), ("failed", "others", 0.5), ("unsupported", "not there", None)
        for verdicts, status in (({"transformers": agrees, "llamacpp": absent}, "passed"),
                                 ({"transformers": agrees, "llamacpp": differs}, "failed"),
                                 ({"transformers": absent, "llamacpp": absent}, "unchecked")):
            rows = self.rounds(True, verdicts)
            self.assertEqual(rows[0]["status"], status)
            self.assertIn("beside=1;turns=alone;context=copied", rows[0]["params"])
            self.assertIn("--model steered --cases decode:1:64", rows[0]["repro"])

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

    def test_a_checkpoint_in_its_place_is_not_copied(self):
        out = Path(tempfile.mkdtemp())
        self.export.write_hf(self.config, self.tensors, out / "hf", 1000)
        before = (out / "hf/model.safetensors").stat().st_mtime_ns
        hf, _ = self.export.export(out / "hf", out, 5000, gguf_too=False)
        self.assertEqual((hf / "model.safetensors").stat().st_mtime_ns, before)
        self.assertEqual(json.loads((hf / "config.json").read_text())["max_position_embeddings"], 5000)

    def test_gguf_file(self):
        try:
            import gguf
        except ImportError:
            self.skipTest("gguf is in the peers' environment only")
        path = Path(tempfile.mkdtemp()) / "x.gguf"
        self.export.write_gguf(self.config, self.tensors, path, 1000)
        back = {t.name: t for t in gguf.GGUFReader(path).tensors}
        plan = list(self.export.gguf_plan(self.config, self.tensors))
        self.assertEqual(sorted(back), sorted(p[0] for p in plan))
        for name, _, shape, make in plan:
            a = make()
            self.assertEqual(a.shape, tuple(shape), name)
            self.assertEqual(back[name].data.tobytes(), a.tobytes(), name)

    def test_rounding_to_bf16_is_to_nearest_even(self):
        a = numpy.array([1.0, 1.00390625, 1.01171875, -2.5], dtype=numpy.float32)
        tensors = {"model.embed_tokens.weight": ("F32", a), "model.norm.weight": ("F32", a), "lm_head.weight": ("F32", a)}
        got = dict((n, v) for n, _, v in self.export.gguf_tensors(dict(self.config, num_hidden_layers=0), tensors))
        wide = self.export.widen("BF16", got["token_embd.weight"])
        self.assertEqual(list(wide), [1.0, 1.0, 1.015625, -2.5])
        self.assertEqual(struct.pack("<f", wide[3]), struct.pack("<f", -2.5))


if __name__ == "__main__":
    unittest.main(verbosity=1)
