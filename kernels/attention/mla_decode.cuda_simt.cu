// Absorbed MLA decode without tensor cores: how its arguments read as keys of attention_simt.cuh.
#include "kernels/attention/attention_simt.cuh"

namespace v3b::kern {

int64_t mla_decode_cuda_simt_scratch_bytes(const spec::MlaDecodeArgs& a) {
  return scratch_of(a).bytes();
}
void mla_decode_cuda_simt(const spec::MlaDecodeArgs& a, void* scratch, CudaStream stream) {
  const SplitScratch s = scratch_of(a);
  Decode p{};
  p.s_q = a.s_q, p.n_h = a.n_h, p.group = a.n_h, p.d_qk = a.d_c + a.d_r;
  p.scale2 = log2_scale(a.scale), p.empty_lse = a.empty_lse, p.q = a.q;
  p.schedule = {a.cache_seqlens, static_cast<int>(a.B), kTile, static_cast<int>(s.slots - a.B)};
  const bool record = a.kv_format != spec::KvFormat::bf16;
  const int64_t row =
      record ? spec::mla_cache_row_bytes(a.kv_format, a.dtype, a.d_c, a.d_r) : a.d_c + a.d_r;
  p.keys = {.k1 = a.cache,
            .v = a.cache,
            .k1_row = row,
            .v_row = row,
            .d1 = a.d_c + a.d_r,
            .d_v = a.d_c,
            .table = a.block_table,
            .page = a.page,
            .record = record};
  p.max_blocks = a.max_blocks;
  p.o = a.out, p.lse = a.lse, p.partial = s.partial(scratch), p.lse2 = s.lse2(scratch);
  run(p, a.B, a.dtype, stream);
}

}  // namespace v3b::kern
