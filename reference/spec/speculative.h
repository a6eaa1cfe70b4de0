// Speculative acceptance (SPEC 1.28): how many drafts survive and which token follows them.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct MtpAcceptShape {
  int64_t B = 32, gamma = 1, V = 129280;
  bool greedy = false;
  DType dtype = DType::f32;
  template <class S, class F>
  static void visit(S& s, F&& v) {
    v("B", s.B);
    v("gamma", s.gamma);
    v("V", s.V);
    v("greedy", s.greedy);
    v("dtype", s.dtype);
  }
};

struct MtpAcceptArgs {
  int64_t B, gamma, V;
  bool greedy;
  const float*
      p;  // [B, gamma + 1, V] target probabilities; greedy: logits will do, ties go to the lower id
  const float* q;  // [B, gamma, V] draft probabilities; null: one-hot drafts; not read if greedy
  const int32_t* draft;   // [B, gamma]
  const double* uniform;  // [B, gamma + 1] in [0, 1): one for each test, the last for the emitted
                          // token; sampling only
  int32_t* accepted;      // [B] 0..gamma
  int32_t* tokens;        // [B, gamma + 1] accepted drafts, then the emitted token, then -1
};

}  // namespace v3b::spec
