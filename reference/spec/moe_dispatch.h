// Token rows out to expert order and back (SPEC 1.14): counts, stable permutation, gather; weighted
// combine. Capacity and token dropping: SPEC 1.15.
#pragma once
#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"
#include "reference/spec/glossary.h"

namespace v3b::spec {

struct MoeDispatchShape {  // uniform routes
  int64_t T = 512, d = 7168, E = 256, K = 8;
  // Capacity factor cf: an expert serves at most max(1, ceil(cf*K*T/E)) slots; 0: all of them.
  double capacity = 0;
  DropPolicy drop_policy = DropPolicy::slot;
  DType dtype = DType::bf16;  // of the rows
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("d", s.d);
    v("E", s.E);
    v("K", s.K);
    v("capacity", s.capacity);
    v("drop_policy", s.drop_policy);
    v("dtype", s.dtype);
  }
};
struct MoeCombineShape {  // uniform routes
  int64_t T = 512, d = 7168, E = 256, K = 8;
  MoeAccum moe_accum = MoeAccum::fp32;
  DType dtype = DType::bf16;  // of the rows
  template <class S, class V>
  static void visit(S& s, V&& v) {
    v("T", s.T);
    v("d", s.d);
    v("E", s.E);
    v("K", s.K);
    v("moe_accum", s.moe_accum);
    v("dtype", s.dtype);
  }
};

// Which slots keep their place when an expert serves at most `capacity` (SPEC 1.15).
struct MoeCapacityArgs {
  int64_t T, E, K;
  const int32_t* idx;   // [T, K]; < 0: unused slot
  const float* weight;  // [T, K] gates; read by DropPolicy::prob only, else may be null
  int64_t capacity;     // >= 1
  DropPolicy drop_policy;
  uint8_t* keep;  // [T, K]: 1 served, 0 dropped or unused
};

struct MoeDispatchArgs {
  int64_t T, d, E, K;
  DType dtype;
  const void* x;                  // [T, d]
  const int32_t* idx;             // [T, K]; < 0: unused slot
  int64_t* offsets;               // [E+1]: rows of expert e are offsets[e] .. offsets[e+1]
  int64_t* row;                   // [T, K]: where the copy went, -1 for unused and dropped slots
  void* rows;                     // [offsets[E], d], sorted by expert, stable in t*K+k
  int64_t capacity = 0;           // most slots that an expert serves; 0: any number
  const float* weight = nullptr;  // [T, K] gates; read with a capacity and DropPolicy::prob only
  DropPolicy drop_policy = DropPolicy::slot;
};

struct MoeCombineArgs {
  int64_t T, d, K;
  DType dtype;
  const void* rows;     // [any, d]
  const int64_t* row;   // [T, K]: row of a slot, -1 for unused slots
  const float* weight;  // [T, K]
  void* y;              // [T, d]
  // fp32: sum over k ascending in fp32, one rounding. bf16: every product and every partial sum is
  // rounded to bf16, in order of `row` (experts ascending), whatever the rows' dtype.
  MoeAccum moe_accum = MoeAccum::fp32;
};

}  // namespace v3b::spec
