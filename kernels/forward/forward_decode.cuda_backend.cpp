// What decode has of its own in the CUDA backend: absorbed attention on the paged latent cache (SPEC 1.8), and the greedy
// loop that stays on the device (SPEC 1.28, 1.32). The rest of the pass is cuda_pass.cpp.
#include <algorithm>
#include <chrono>
#include <string>

#include "kernels/attention/attention_cuda.h"
#include "kernels/forward/cuda_backend.h"
#include "kernels/forward/cuda_model.h"
#include "kernels/forward/forward_glue_cuda.h"
#include "kernels/gemm/gemm_cuda.h"
#include "kernels/mtp/mtp_cuda.h"
#include "model/error.h"
#include "model/mtp_support.h"

namespace v3b::kern {
namespace {
constexpr int kMainReplays = 3;  // emulated: one, its time means nothing
constexpr int64_t kLaunchesAtOnce = 64;
}  // namespace

void attention_absorbed_cuda(const CudaLayerContext& ctx, const AttentionDims& m,
                             const DeviceLayer& p, const AttentionUnit& u, const DevicePlan& dp,
                             uint8_t* arena, DeviceWorkspace& ws, CudaStream stream) {
  const int64_t n = u.B * u.s_q, row = m.d_c + m.d_r, e = m.e;
  uint8_t* q_abs = static_cast<uint8_t*>(ws.q_abs.reserve(n * m.n_h * row * e));
  ws.o_lat.reserve(n * m.n_h * m.d_c * e);
  const uint8_t* q = ws.q.as<uint8_t>() + u.first * m.n_h * m.d_qk * e;
  GemmArgs g;
  g.M = n, g.N = m.d_c, g.K = m.d_n;
  g.a = q, g.lda = m.n_h * m.d_qk;
  g.b = p.uk_t.data, g.ldb = m.d_n;
  g.c = q_abs, g.ldc = m.n_h * row;
  g.ab_type = g.c_type = ctx.dtype;
  gemm_batched_cuda_mma(g, m.n_h, m.d_qk, m.d_c * m.d_n, row, stream);
  copy_rows_cuda_simt(n * m.n_h, m.d_r, q + m.d_n * e, ctx.dtype, m.d_qk, q_abs + m.d_c * e,
                      ctx.dtype, row, stream);

  spec::MlaDecodeArgs a{};
  a.B = u.B, a.s_q = u.s_q, a.n_h = m.n_h, a.d_c = m.d_c, a.d_r = m.d_r;
  a.page = dp.page, a.max_blocks = u.max_blocks;
  a.scale = ctx.softmax_scale;
  a.dtype = ctx.dtype;
  a.kv_format = ctx.flags.kv_format;
  a.empty_lse = ctx.flags.empty_lse;
  a.q = q_abs;
  a.cache = arena;
  a.block_table = dp.tables + u.table;
  a.cache_seqlens = dp.seqlens + u.lens;
  a.out = ws.o_lat.data();
  if (ctx.dtype == spec::DType::bf16 && mla_decode_cuda_mma_takes(m.d_c, m.d_r))
    mla_decode_cuda_mma(a, ws.attention.reserve(mla_decode_cuda_mma_scratch_bytes(a)), stream);
  else
    mla_decode_cuda_simt(a, ws.attention.reserve(mla_decode_cuda_simt_scratch_bytes(a)), stream);

  const int64_t both = m.d_n + m.d_v;
  GemmArgs w;
  w.M = n, w.N = m.d_v, w.K = m.d_c;
  w.a = ws.o_lat.data(), w.lda = m.n_h * m.d_c;
  w.b = static_cast<const uint8_t*>(p.kv_b.data) + m.d_n * m.d_c * e, w.ldb = m.d_c;
  w.c = ws.attn.as<uint8_t>() + u.first * m.n_h * m.d_v * e, w.ldc = m.n_h * m.d_v;
  w.ab_type = w.c_type = ctx.dtype;
  gemm_batched_cuda_mma(w, m.n_h, m.d_c, both * m.d_c, m.d_v, stream);
}

CudaDecodeResult cuda_decode_greedy(model::Backend& backend,
                                    std::span<const std::vector<int32_t>> prompts, int64_t max_new,
                                    int64_t drafts) {
  CudaModel& m = cuda_model_of(backend);
  const int64_t B = static_cast<int64_t>(prompts.size()), d = m.cfg.hidden_size,
                V = m.cfg.vocab_size, s_q = 1 + drafts;
  if (drafts < 0 || drafts > 1)
    throw Error(ExitCode::usage, "the device decode loop drafts at most one token", "drafts",
                "0 or 1", std::to_string(drafts));
  if (drafts > 0 && m.weights.mtp.empty())
    throw Error(ExitCode::usage, "this checkpoint has no MTP module", "drafts");
  if (drafts > 0) model::check_single_mtp(m.cfg, backend.name());
  if (m.dynamic_rope)
    throw Error(ExitCode::usage, "the device decode loop has no dynamic RoPE scaling",
                backend.name());
  CudaDecodeResult out;
  out.tokens.resize(prompts.size());
  if (B == 0 || max_new < 1) return out;

  // Prefill through the backend; the first token (and draft) come to the host once.
  const auto t0 = std::chrono::steady_clock::now();
  std::vector<std::unique_ptr<model::Sequence>> sequences;
  std::vector<int32_t> ids, length, mtp_length;
  const auto best = [&](const std::vector<float>& row) {  // last row; lowest index among equals
    const auto from = row.end() - V;
    return static_cast<int32_t>(std::max_element(from, row.end()) - from);
  };
  int64_t longest = 0;
  for (const auto& prompt : prompts) {
    sequences.push_back(backend.new_sequence());
    const model::ForwardResult r = backend.forward(
        *sequences.back(), prompt, {.logits = model::LogitsOf::last, .hidden = drafts > 0});
    ids.push_back(best(r.logits));
    out.tokens[sequences.size() - 1].push_back(ids.back());
    if (drafts > 0) {
      std::vector<int32_t> next(prompt.begin() + 1, prompt.end());
      next.push_back(ids.back());
      const model::ForwardResult q =
          backend.mtp_forward(*sequences.back(), next, r.hidden, {.logits = model::LogitsOf::last});
      ids.push_back(best(q.logits));
    }
    length.push_back(static_cast<int32_t>(prompt.size()));
    mtp_length.push_back(static_cast<int32_t>(prompt.size()));
    longest = std::max(longest, static_cast<int64_t>(prompt.size()));
  }
  out.prefill_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  if (max_new == 1) return out;

  // Room for every row that a step may write, all pages fixed before the capture.
  const int64_t page = m.main_pool->page(), most = longest + max_new + s_q;
  if (most > m.room)
    throw Error(ExitCode::usage, "context too long for the tokens asked for", "max_new",
                "at most " + std::to_string(m.room) + " rows", std::to_string(most));
  DecodeState s;
  s.B = B, s.s_q = s_q, s.page = page, s.max_tokens = max_new - 1,
  s.max_blocks = (most + page - 1) / page;
  std::vector<int32_t> tables, mtp_tables;
  int32_t last_page = 0, last_mtp_page = 0;
  for (const auto& q : sequences) {
    auto& seq = dynamic_cast<PagedSequence&>(*q);
    const auto take = [&](PagedTrack& t, std::vector<int32_t>& all, int32_t& last) {
      t.reserve(most);
      all.insert(all.end(), t.blocks().begin(), t.blocks().begin() + s.max_blocks);
      for (const int32_t b : t.blocks()) last = std::max(last, b);
    };
    take(seq.main, tables, last_page);
    if (drafts > 0) take(seq.mtp, mtp_tables, last_mtp_page);
  }
  m.main_arena->ensure(last_page + 1);
  if (drafts > 0) m.mtp_arena->ensure(last_mtp_page + 1);
  m.extend_rope(most);

  std::vector<DeviceBuffer> keep;
  const auto array = [&](int64_t n, const std::vector<int32_t>* from = nullptr) {
    keep.emplace_back(std::max<int64_t>(n, 1) * 4);
    cuda_fill(keep.back().data(), 0, keep.back().bytes(), m.stream);
    if (from != nullptr && !from->empty())
      cuda_upload(keep.back().data(), from->data(), static_cast<int64_t>(from->size()) * 4,
                  m.stream);
    return keep.back().as<int32_t>();
  };
  s.tables = array(B * s.max_blocks, &tables), s.mtp_tables = array(B * s.max_blocks, &mtp_tables);
  s.length = array(B, &length), s.mtp_length = array(B, &mtp_length);
  s.ids = array(B * s_q, &ids);
  s.positions = array(B * s_q), s.slots = array(B * s_q), s.seqlens = array(B);
  s.next_ids = array(B * s_q), s.mtp_positions = array(B * s_q), s.mtp_slots = array(B * s_q),
  s.mtp_seqlens = array(B);
  s.accepted = array(B), s.argmax = array(B * s_q), s.mtp_argmax = array(B * s_q);
  s.tokens = array(B * s.max_tokens), s.emitted = array(B), s.stats = array(3);
  DeviceBuffer hidden(B * s_q * d * 4);

  Plan plan;  // one absorbed unit; the arrays are the state's
  plan.rows = B * s_q;
  AttentionUnit unit;
  unit.B = B, unit.s_q = s_q, unit.max_blocks = s.max_blocks;
  plan.units.push_back(unit);
  DevicePlan main_pass, mtp_pass;
  main_pass.rows = mtp_pass.rows = B * s_q;
  main_pass.page = mtp_pass.page = page;
  main_pass.positions = s.positions, main_pass.slots = s.slots, main_pass.tables = s.tables,
  main_pass.seqlens = s.seqlens;
  mtp_pass.positions = s.mtp_positions, mtp_pass.slots = s.mtp_slots,
  mtp_pass.tables = s.mtp_tables, mtp_pass.seqlens = s.mtp_seqlens;

  // Greedy acceptance without drafts is the argmax of each row.
  spec::MtpAcceptArgs choose{};
  choose.B = plan.rows, choose.V = V, choose.greedy = true, choose.accepted = array(plan.rows);
  DeviceBuffer best_scratch(mtp_accept_cuda_scratch_bytes(choose));
  const auto argmax = [&](const float* logits, int32_t* out) {
    spec::MtpAcceptArgs a = choose;
    a.p = logits, a.tokens = out;
    mtp_accept_cuda_simt(a, best_scratch.data(), m.stream);
  };
  const auto main_forward = [&] {
    decode_begin_cuda_simt(s, m.stream);
    m.ws.h.reserve(plan.rows * d * 4);
    m.embed(m.weights.embed, plan.rows, s.ids, m.ws.h.as<float>());
    for (int64_t l = 0; l < m.cfg.num_hidden_layers; ++l) m.run_layer(l, plan, main_pass, {});
    if (drafts > 0) m.hidden_rows(m.weights.norm, 0, plan.rows, hidden.as<float>());
    argmax(m.logits(m.weights.norm, m.weights.head_or_embed(), m.ws.h.as<float>(), plan.rows),
           s.argmax);
  };
  const auto step = [&] {
    main_forward();
    decode_accept_cuda_simt(s, m.stream);
    if (drafts == 0) return;
    m.mtp_input(plan.rows, s.next_ids, hidden.as<float>(), false);
    m.run_layer(m.cfg.num_hidden_layers, plan, mtp_pass, {});
    argmax(m.logits(m.weights.mtp[0].norm, m.mtp_head(), m.ws.h.as<float>(), plan.rows),
           s.mtp_argmax);
    decode_draft_cuda_simt(s, m.stream);
  };
  step();  // grows every buffer; the next ones allocate nothing
  cuda_synchronize(m.stream);
  const auto back = [&](int32_t* to, const std::vector<int32_t>& v) {
    cuda_upload(to, v.data(), static_cast<int64_t>(v.size()) * 4, m.stream);
  };
  back(s.length, length), back(s.mtp_length, mtp_length), back(s.ids, ids);
  cuda_fill(s.emitted, 0, B * 4, m.stream);
  cuda_fill(s.stats, 0, 12, m.stream);
  const auto captured = [&](const auto& work) {
    CudaGraph g;
    g.begin(m.stream);
    work();
    g.end(m.stream);
    return g;
  };
  CudaGraph graph = captured(step), main_graph = captured(main_forward);
  // It writes the rows of the next step, which writes them again.
  const bool real = cuda_device().mode == CudaMode::device;
  const int replays = real ? kMainReplays : 1;
  const auto time_main = [&] {
    if (real) main_graph.launch(m.stream);
    return cuda_seconds(m.stream,
                        [&] {
                          for (int i = 0; i < replays; ++i) main_graph.launch(m.stream);
                        }) /
           replays;
  };
  const double main_first = drafts > 0 ? time_main() : 0;

  const auto emitted = [&] {
    std::vector<int32_t> n(static_cast<size_t>(B));
    cuda_download(n.data(), s.emitted, B * 4, m.stream);
    return *std::min_element(n.begin(), n.end());
  };
  // A step emits one token at least: so many launches can never be too many, and the host looks only between batches.
  // So many that they fit the launch queue while a kernel holds the device (cuda_seconds).
  for (int64_t have = 0; have < max_new - 1; have = emitted()) {
    const int64_t n = std::clamp<int64_t>((max_new - 1 - have + s_q - 1) / s_q, 1, kLaunchesAtOnce);
    out.seconds += cuda_seconds(m.stream, [&] {
      for (int64_t i = 0; i < n; ++i) graph.launch(m.stream);
    });
    out.steps += n;
  }
  out.emitted = B * (max_new - 1);
  out.main_seconds =
      drafts > 0 ? (main_first + time_main()) / 2 : out.seconds / static_cast<double>(out.steps);
  std::vector<int32_t> tokens(static_cast<size_t>(B * s.max_tokens)), stats(3);
  cuda_download(tokens.data(), s.tokens, B * s.max_tokens * 4, m.stream);
  cuda_download(stats.data(), s.stats, 12, m.stream);
  for (int64_t b = 0; b < B; ++b)
    out.tokens[static_cast<size_t>(b)].insert(out.tokens[static_cast<size_t>(b)].end(),
                                              tokens.begin() + b * s.max_tokens,
                                              tokens.begin() + (b + 1) * s.max_tokens);
  out.drafts = stats[1], out.accepted = stats[2];
  return out;
}

}  // namespace v3b::kern
