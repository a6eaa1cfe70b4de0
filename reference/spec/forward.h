// Whole forward passes as ops: prefill, batched decode, MTP rows (SPEC 1.25, 1.32). Defaults: the
// shipped model's size. Keys are SPEC 0.1's.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

// steered: random weights whose routes no rounding flips. tiny_v3: the checkpoint that ships.
enum class ForwardWeights : uint8_t { steered, tiny_v3 };
// What is cached before the pass: tokens that were run through the model, or made-up rows (long contexts, whose prefill
// the reference would take hours for).
enum class ForwardContext : uint8_t { tokens, rows };

struct ForwardShape {
  int64_t B = 1;           // sequences
  int64_t T = 1;           // new tokens of each
  int64_t s0 = 0;          // tokens of each that are cached already
  int64_t L = 4, L_d = 1;  // layers, dense lead layers
  int64_t d = 256, n_h = 8, d_n = 32, d_r = 16, d_v = 32, d_q = 96, d_c = 64;
  int64_t f = 512, m = 128, E = 16, N_s = 1, K = 4, G = 4, M = 2, V = 4096;
  KvFormat kv_format = KvFormat::bf16;
  ForwardContext context = ForwardContext::tokens;
  ForwardWeights weights = ForwardWeights::steered;
  DType w_dtype = DType::bf16;  // of the stored matrices: bf16 or f8e4m3 with block scales
  DType dtype = DType::bf16;    // compute: bf16 or f32; weights are bf16 values in both
  template <class S, class F>
  static void visit(S& s, F&& v) {
    v("B", s.B);
    v("T", s.T);
    v("s0", s.s0);
    v("L", s.L);
    v("L_d", s.L_d);
    v("d", s.d);
    v("n_h", s.n_h);
    v("d_n", s.d_n);
    v("d_r", s.d_r);
    v("d_v", s.d_v);
    v("d_q", s.d_q);
    v("d_c", s.d_c);
    v("f", s.f);
    v("m", s.m);
    v("E", s.E);
    v("N_s", s.N_s);
    v("K", s.K);
    v("G", s.G);
    v("M", s.M);
    v("V", s.V);
    v("kv_format", s.kv_format);
    v("context", s.context);
    v("weights", s.weights);
    v("w_dtype", s.w_dtype);
    v("dtype", s.dtype);
  }
};

}  // namespace v3b::spec
