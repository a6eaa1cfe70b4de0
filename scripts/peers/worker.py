#!/usr/bin/env python3
"""One peer in a process of its own, told what to do by lines of JSON on standard input (run.py writes them):

    {"do": "logits", "ids": [...]}                            -> {"logits": path of a .npy, [tokens, vocabulary]}
    {"do": "time", "ids": [[...], ...], "T": 1, "seconds": 1, "copied": false, "outputs": "last"} -> {"samples_us": [...]}

`time`: every sequence's ids but the last T are cached first; a run is the pass over the last T of all of them, with the
logits of each last row, and the cache is cut back between runs outside the clock. copied: the cached rows of the first
sequence are computed, the others get copies of their own. outputs: all asks for every row's logits: llama.cpp takes only
rows with outputs through the last layer's FFN and the head, ours and transformers all rows through the layer. Also the pieces run.py's self-test needs: the peer `echo` computes nothing and answers like the others.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


class Transformers:
    def __init__(self, model, threads, context):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16).eval()
        self.what = f"transformers {transformers.__version__}, torch {torch.__version__}, bf16, " \
                    f"{self.model.config._attn_implementation}"

    def logits(self, ids):
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].float().numpy()

    def start(self, ids, T, copied, outputs):
        from transformers import DynamicCache

        torch, cached = self.torch, len(ids[0]) - T
        all_ids, cache = torch.tensor(ids), DynamicCache(config=self.model.config)
        fill = all_ids[:1] if copied else all_ids
        with torch.inference_mode():
            for at in range(0, cached, 512):
                self.model(fill[:, at:min(cached, at + 512)], past_key_values=cache, use_cache=True, logits_to_keep=1)
            if copied and cached and len(ids) > 1:
                cache.batch_repeat_interleave(len(ids))

        def run():
            with torch.inference_mode():
                return self.model(all_ids[:, cached:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits

        return run, lambda: cache.crop(-T)


class LlamaCpp:
    def __init__(self, model, threads, context):
        import ctypes

        import llama_cpp
        import numpy

        self.c, self.ctypes, self.np = llama_cpp, ctypes, numpy
        self.threads, self.context = threads, context
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.what = f"llama-cpp-python {llama_cpp.__version__}, bf16 weights, f16 cache"

    def open(self, sequences, rows, batch):
        c = self.c
        p = c.llama_context_default_params()
        p.n_ctx = sequences * ((rows + 255) // 256 * 256)
        p.n_batch = p.n_ubatch = max(512, batch)
        p.n_seq_max = sequences
        p.n_threads = p.n_threads_batch = self.threads
        ctx = c.llama_init_from_model(self.model, p)
        if not ctx:
            raise RuntimeError("llama.cpp gives no context of this size")
        return ctx

    def batch_of(self, items):
        """items: (token, position, sequence, wants logits)."""
        b = self.c.llama_batch_init(len(items), 0, 1)
        b.n_tokens = len(items)
        for i, (token, pos, seq, wants) in enumerate(items):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, pos, 1, 1 if wants else 0
            b.seq_id[i][0] = seq
        return b

    def decode(self, ctx, batch):
        code = self.c.llama_decode(ctx, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode: {code}")
        self.c.llama_synchronize(ctx)

    def logits(self, ids):
        ctx = self.open(1, len(ids), len(ids))
        b = self.batch_of([(t, i, 0, True) for i, t in enumerate(ids)])
        self.decode(ctx, b)
        out = self.np.stack([self.np.ctypeslib.as_array(self.c.llama_get_logits_ith(ctx, i), (self.vocab,)).copy()
                             for i in range(len(ids))])
        self.c.llama_batch_free(b)
        self.c.llama_free(ctx)
        return out

    def start(self, ids, T, copied, outputs):
        c, cached = self.c, len(ids[0]) - T
        ctx = self.open(len(ids), len(ids[0]), len(ids) * T)
        memory = c.llama_get_memory(ctx)
        for s, row in enumerate(ids):
            if copied and s > 0 and cached:
                c.llama_memory_seq_cp(memory, 0, s, -1, -1)
                continue
            for at in range(0, cached, 512):
                part = range(at, min(cached, at + 512))
                b = self.batch_of([(row[i], i, s, False) for i in part])
                self.decode(ctx, b)
                c.llama_batch_free(b)
        batch = self.batch_of([(row[i], i, s, outputs == "all" or i + 1 == len(row)) for s, row in enumerate(ids)
                               for i in range(cached, len(row))])
        last = [s * T + T - 1 for s in range(len(ids))]

        def run():
            self.decode(ctx, batch)
            return [self.np.ctypeslib.as_array(c.llama_get_logits_ith(ctx, i), (self.vocab,)).copy() for i in last]

        def cut():
            for s in range(len(ids)):
                c.llama_memory_seq_rm(memory, s, cached, -1)

        return run, cut


class Echo:  # for the self-test: logits that are known, time that is nothing
    what = "echo"

    def __init__(self, model, threads, context):
        self.vocab = json.load(open(os.path.join(model, "config.json")))["vocab_size"]

    def logits(self, ids):
        return [[float((i * 31 + v) % 97) for v in range(self.vocab)] for i in ids]

    def start(self, ids, T, copied, outputs):
        return (lambda: None), (lambda: None)


def write_npy(path, rows):
    """Rows of floats (lists or numpy) as a float32 array, without numpy where there is none."""
    if not isinstance(rows, list):
        import numpy

        numpy.save(path, numpy.ascontiguousarray(rows, dtype=numpy.float32))
        return
    import array

    head = str({"descr": "<f4", "fortran_order": False, "shape": (len(rows), len(rows[0]))})
    head += " " * (-(10 + len(head) + 1) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode())
        for row in rows:
            f.write(array.array("f", row).tobytes())


PEERS = {"transformers": Transformers, "llamacpp": LlamaCpp, "echo": Echo}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--peer", choices=PEERS, required=True)
    ap.add_argument("--model", required=True)
    ap.add_argument("--threads", type=int, required=True)
    ap.add_argument("--context", type=int, required=True)
    ap.add_argument("--scratch", required=True)
    a = ap.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)

    def answer(**fields):
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        peer = PEERS[a.peer](a.model, a.threads, a.context)
    except Exception as e:  # the row says why
        answer(error=f"{type(e).__name__}: {e}".splitlines()[0][:200])
        return 1
    answer(what=peer.what)
    ready = {}
    for line in sys.stdin:
        task = json.loads(line)
        try:
            if task["do"] == "logits":
                path = os.path.join(a.scratch, f"{a.peer}.npy")
                write_npy(path, peer.logits(task["ids"]))
                answer(logits=path)
                continue
            key = json.dumps([task["ids"], task["T"]])
            if ready.get("key") != key:  # the context is filled once for all rounds of a case
                ready.clear()  # and what it held, before the next
                ready.update(key=key, pair=peer.start(task["ids"], task["T"], task.get("copied", False),
                                                        task.get("outputs", "last")))
                run, cut = ready["pair"]
                run(), cut()  # lazy initialisation is not a sample
            run, cut = ready["pair"]
            samples, begun = [], time.perf_counter()
            while not samples or time.perf_counter() - begun < task["seconds"]:
                t0 = time.perf_counter_ns()
                run()
                samples.append((time.perf_counter_ns() - t0) / 1e3)
                cut()
            answer(samples_us=samples)
        except Exception as e:
            ready.clear()
            answer(error=f"{type(e).__name__}: {e}".splitlines()[0][:200])
    return 0


if __name__ == "__main__":
    sys.exit(main())
