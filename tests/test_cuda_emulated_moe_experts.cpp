// Grouped expert products of the CUDA backend on the emulation against float64: the whole op in every pair of types,
// contiguous and masked layouts, E4M3 activations, experts that nobody chose (their weights are NaN).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "bench/harness/check.h"
#include "bench/ops/registry.h"
#include "kernels/moe/moe_experts_cuda.h"
#include "model/error.h"
#include "reference/fp8_quant.h"
#include "reference/moe.h"
#include "reference/spec/fp8_quant.h"

namespace v3b::kern {
namespace {

using spec::DType;
const bool kEmulate = [] { return setenv("V3BENCH_CUDA", "emulate", 1) == 0; }();

// Rounds values to the type and puts them on the device.
DeviceBuffer put(std::vector<double>& v, DType t) {
  std::vector<uint8_t> bytes(v.size() * size_t(spec::dtype_bytes(t)) + 16);
  for (size_t i = 0; i < v.size(); ++i) {
    const float x = static_cast<float>(v[i]);
    if (t == DType::f32) {
      reinterpret_cast<float*>(bytes.data())[i] = x;
      v[i] = x;
    } else if (t == DType::bf16) {
      auto& b = reinterpret_cast<spec::bf16*>(bytes.data())[i] = spec::to_bf16(x);
      v[i] = spec::to_float(b);
    } else {
      auto& b = reinterpret_cast<spec::f8e4m3*>(bytes.data())[i] = spec::to_f8e4m3(x);
      v[i] = spec::to_float(b);
    }
  }
  DeviceBuffer d{int64_t(bytes.size())};
  cuda_upload(d.data(), bytes.data(), int64_t(bytes.size()), cuda_stream());
  return d;
}
template <class T>
DeviceBuffer put_raw(const std::vector<T>& v) {
  DeviceBuffer d{int64_t(v.size() * sizeof(T)) + 16};
  cuda_upload(d.data(), v.data(), int64_t(v.size() * sizeof(T)), cuda_stream());
  return d;
}
std::vector<double> get(const DeviceBuffer& d, size_t n, DType t) {
  std::vector<uint8_t> bytes(size_t(d.bytes()));
  cuda_download(bytes.data(), d.data(), d.bytes(), cuda_stream());
  std::vector<double> v(n);
  for (size_t i = 0; i < n; ++i)
    v[i] = t == DType::f32 ? reinterpret_cast<float*>(bytes.data())[i]
                           : spec::to_float(reinterpret_cast<spec::bf16*>(bytes.data())[i]);
  return v;
}
std::vector<double> normal(size_t n, double scale, unsigned seed) {
  std::mt19937 r(seed);
  std::normal_distribution<double> x(0, scale);
  std::vector<double> v(n);
  for (double& e : v) e = x(r);
  return v;
}
double error(const std::vector<double>& got, const std::vector<double>& want) {
  double e = 0, n = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    e += (got[i] - want[i]) * (got[i] - want[i]);
    n += want[i] * want[i];
  }
  return std::sqrt(e / n);
}

// E experts with widened copies for the reference.
struct Bank {
  std::vector<std::vector<double>> wide;
  std::vector<DeviceBuffer> keep;
  std::vector<spec::FfnPointers> device;
  std::vector<ref::Ffn<double>> reference;
};
Bank make_bank(int64_t E, int64_t d, int64_t m, DType t, const std::vector<bool>& used,
               unsigned seed) {
  Bank b;
  for (int64_t e = 0; e < E; ++e) {
    spec::FfnPointers f{};
    const void** pointer[3] = {&f.gate, &f.up, &f.down};
    const float** scale[3] = {&f.gate_scale, &f.up_scale, &f.down_scale};
    for (int i = 0; i < 3; ++i) {
      const int64_t rows = i == 2 ? d : m, cols = i == 2 ? m : d;
      const bool fp8 = t == DType::f8e4m3;
      auto v = normal(size_t(rows * cols), fp8 ? 64 : 1 / std::sqrt(double(cols)),
                      seed + unsigned(3 * e + i));
      if (!used[size_t(e)])
        for (double& x : v) x = std::numeric_limits<double>::quiet_NaN();
      b.keep.push_back(put(v, t));
      *pointer[i] = b.keep.back().data();
      if (fp8) {
        const int64_t kb = spec::fp8_blocks(cols);
        auto s = normal(size_t(spec::fp8_blocks(rows) * kb), 0.3, seed + unsigned(100 + e));
        for (double& x : s) x = std::exp(x) / 64 / std::sqrt(double(cols));
        b.keep.push_back(put(s, DType::f32));
        *scale[i] = b.keep.back().as<float>();
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < cols; ++c)
            v[size_t(r * cols + c)] *= s[size_t(r / 128 * kb + c / 128)];
      }
      b.wide.push_back(std::move(v));
    }
    b.device.push_back(f);
  }
  for (int64_t e = 0; e < E; ++e)
    b.reference.push_back({b.wide[size_t(3 * e)].data(), b.wide[size_t(3 * e + 1)].data(),
                           b.wide[size_t(3 * e + 2)].data()});
  return b;
}

void check_whole(int64_t T, int64_t d, int64_t m, int64_t E, int64_t K, int64_t shared_m, DType xt,
                 DType wt, bool mma) {
  SCOPED_TRACE(testing::Message() << "T=" << T << " d=" << d << " m=" << m << " x=" << int(xt)
                                  << " w=" << int(wt) << " mma=" << mma);
  std::mt19937 r(7);
  std::vector<int32_t> idx(size_t(T * K), -1);
  std::vector<bool> used(size_t(E), false);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) {
      const auto e = int32_t((r() % uint32_t(E - 1) + uint32_t(k)) % uint32_t(E - 1));
      bool twice = t % 5 == 4 && k == 1;  // an unused slot now and then
      for (int64_t j = 0; j < k; ++j) twice |= idx[size_t(t * K + j)] == e;
      if (twice) continue;
      idx[size_t(t * K + k)] = e;  // expert E-1 is never chosen
      used[size_t(e)] = true;
    }
  auto x = normal(size_t(T * d), 1, 1);
  std::vector<double> weight(size_t(T * K));
  for (double& w : weight) w = 0.1 + double(r() % 100) / 100;
  const DeviceBuffer dx = put(x, xt), dw = put(weight, DType::f32), di = put_raw(idx);
  Bank experts = make_bank(E, d, m, wt, used, 11);
  Bank shared = make_bank(1, d, std::max<int64_t>(shared_m, 1), wt, {true}, 77);
  const DeviceBuffer pointers = put_raw(experts.device);
  DeviceBuffer y(T * d * spec::dtype_bytes(xt));
  spec::MoeExpertsArgs a{T,
                         d,
                         m,
                         E,
                         K,
                         shared_m,
                         xt,
                         wt,
                         dx.data(),
                         di.as<int32_t>(),
                         dw.as<float>(),
                         pointers.as<spec::FfnPointers>(),
                         shared_m > 0 ? shared.device[0] : spec::FfnPointers{},
                         y.data()};
  DeviceBuffer scratch(moe_experts_cuda_scratch_bytes(a));
  (mma ? moe_experts_cuda_mma : moe_experts_cuda_simt)(a, scratch.data(), cuda_stream());
  cuda_synchronize(cuda_stream());
  std::vector<double> want(size_t(T * d));
  ref::moe<double>(T, d, m, E, K, x.data(), idx.data(), weight.data(), experts.reference,
                   shared_m > 0 ? shared.reference[0] : ref::Ffn<double>{}, shared_m, want.data());
  const double e = error(get(y, want.size(), xt), want);
  EXPECT_TRUE(e <= (xt == DType::bf16 ? 4e-3 : 1e-5)) << e;
}

TEST(CudaMoeExperts, WholeOp) {
  using enum DType;
  for (const auto& [x, w] :
       {std::pair{bf16, bf16}, {bf16, f8e4m3}, {f32, f32}, {f32, bf16}, {f32, f8e4m3}, {bf16, f32}})
    for (const bool mma : {true, false}) {
      if (mma && (x == f32 || w == f32)) continue;
      check_whole(3, 203, 37, 9, 2, 50, x, w, mma);
      check_whole(41, 320, 208, 6, 2, 0, x, w, mma);
      if (mma) check_whole(150, 136, 80, 4, 2, 144, x, w, mma);  // several tiles an expert
      if (mma) check_whole(30, 256, 80, 16, 4, 80, x, w, mma);
    }
}

// Contiguous or masked groups, one feed-forward.
void check_ffn(bool masked, int64_t capacity, bool fp8) {
  SCOPED_TRACE(testing::Message() << "masked=" << masked << " capacity=" << capacity
                                  << " fp8=" << fp8);
  const int64_t E = 5, d = 272, m = 144;
  const std::vector<int32_t> counts = {3, 0, static_cast<int32_t>(capacity), 1, 0};
  std::vector<int64_t> offsets(size_t(E + 1), 0);
  std::vector<bool> used;
  for (int64_t e = 0; e < E; ++e) {
    offsets[size_t(e + 1)] = offsets[size_t(e)] + counts[size_t(e)];
    used.push_back(counts[size_t(e)] > 0);
  }
  const int64_t rows = masked ? E * capacity : offsets[size_t(E)];
  auto x = normal(size_t(rows * d), 1, 3);
  for (int64_t e = 0; e < E && masked; ++e)  // rows that nobody owns
    for (int64_t i = (e * capacity + counts[size_t(e)]) * d; i < (e + 1) * capacity * d; ++i)
      x[size_t(i)] = std::numeric_limits<double>::quiet_NaN();
  const DType type = fp8 ? DType::f8e4m3 : DType::bf16;
  DeviceBuffer dx, dscale;
  const int64_t kb = spec::fp8_blocks(d);
  if (fp8) {
    std::vector<spec::f8e4m3> codes(x.size());
    std::vector<float> scales(size_t(rows * kb));
    ref::fp8_quantize_act<double>(rows, d, x.data(), codes.data(), scales.data());
    ref::fp8_dequantize_act<double>(rows, d, codes.data(), scales.data(), x.data());
    dx = put_raw(codes), dscale = put_raw(scales);
  } else {
    dx = put(x, DType::bf16);
  }
  Bank bank = make_bank(E, d, m, type, used, 5);
  const DeviceBuffer pointers = put_raw(bank.device), doff = put_raw(offsets),
                     dcounts = put_raw(counts);
  DeviceBuffer hidden(rows * m * 2), codes(rows * m), scales(rows * spec::fp8_blocks(m) * 4),
      out(rows * d * 4);
  MoeFfnArgs a{};
  a.groups.E = E;
  if (masked) {
    a.groups.counts = dcounts.as<int32_t>(), a.groups.capacity = capacity;
  } else {
    a.groups.offsets = doff.as<int64_t>(), a.groups.max_rows = rows + 7;  // a bound, not exact
    a.groups.max_of_one = capacity;
    hidden = DeviceBuffer((rows + 7) * m * 2), codes = DeviceBuffer((rows + 7) * m);
    scales = DeviceBuffer((rows + 7) * spec::fp8_blocks(m) * 4);
  }
  a.d = d, a.m = m, a.x_type = a.w_type = type, a.x = dx.data(), a.x_scale = dscale.as<float>();
  a.experts = pointers.as<spec::FfnPointers>(), a.hidden = hidden.data();
  a.hidden_codes = codes.as<spec::f8e4m3>(), a.hidden_scale = scales.as<float>();
  a.out = out.as<float>();
  (fp8 ? moe_ffn_fp8_cuda_mma : moe_ffn_cuda_mma)(a, cuda_stream());
  cuda_synchronize(cuda_stream());
  const auto got = get(out, size_t(rows * d), DType::f32);
  std::vector<double> part_got, part_want;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t i = 0; i < counts[size_t(e)]; ++i) {
      const int64_t row = (masked ? e * capacity : offsets[size_t(e)]) + i;
      const double* xr = x.data() + row * d;
      const auto& w = bank.reference[size_t(e)];
      std::vector<double> h(size_t(m), 0.0), y(size_t(d), 0.0);
      for (int64_t j = 0; j < m; ++j) {
        double g = 0, u = 0;
        for (int64_t k = 0; k < d; ++k)
          g += xr[k] * w.gate[j * d + k], u += xr[k] * w.up[j * d + k];
        h[size_t(j)] = spec::to_float(spec::to_bf16(float(g / (1 + std::exp(-g)) * u)));
      }
      if (fp8) {
        std::vector<spec::f8e4m3> q(h.size());
        std::vector<float> s(size_t(spec::fp8_blocks(m)));
        ref::fp8_quantize_act<double>(1, m, h.data(), q.data(), s.data());
        ref::fp8_dequantize_act<double>(1, m, q.data(), s.data(), h.data());
      }
      for (int64_t j = 0; j < d; ++j)
        for (int64_t k = 0; k < m; ++k) y[size_t(j)] += h[size_t(k)] * w.down[j * m + k];
      part_want.insert(part_want.end(), y.begin(), y.end());
      part_got.insert(part_got.end(), got.begin() + row * d, got.begin() + (row + 1) * d);
    }
  // Same roundings as the reference; a hidden element or code may fall to the other side of a tie.
  const double err = error(part_got, part_want);
  EXPECT_TRUE(err <= (fp8 ? 5e-3 : 1e-3)) << err;
}
TEST(CudaMoeExperts, Layouts) {
  for (const bool masked : {false, true})
    for (const int64_t capacity : {5, 16, 70})
      for (const bool fp8 : {false, true}) check_ffn(masked, capacity, fp8);
}

// The op's own cases with E4M3 rows: hidden rows quantised in between, ragged blocks, experts that nobody chose.
TEST(CudaMoeExperts, Fp8RowsAsJobs) {
  int checked = 0;
  for (const auto& op : bench::all_ops()) {
    if (op->name() != "moe_experts") continue;
    for (const auto& text :
         {"T=8,d=256,m=80,E=16,K=4,shared_m=80", "T=3,d=203,m=37,E=9,K=2,shared_m=50",
          "T=41,d=320,m=200,E=6,K=2,shared_m=0,hot=3", "T=70,d=384,m=144,E=3,K=2,shared_m=272"}) {
      const auto info = op->parse_case(std::string(text) + ",w_dtype=f8e4m3,dtype=f8e4m3");
      bench::CaseChecker checker(*op, info, 3);
      for (const auto& how : {"cpu_eigen", "cuda_mma"}) {
        const auto r = checker.check(how);
        EXPECT_EQ(r.status, "passed") << how << " " << info.text << ": " << r.reason;
        ++checked;
      }
      EXPECT_EQ(checker.check("cuda_simt").status, "unsupported");
      EXPECT_EQ(checker.check("cpu_simd").status, "unsupported");
      EXPECT_EQ(checker.check("cuda_cublas").status, "not_built");
    }
    EXPECT_THROW(op->parse_case("T=3,dtype=f8e4m3,w_dtype=bf16"), Error);
  }
  EXPECT_EQ(checked, 8);
}

// The weighted sum around library products: rows and result in bf16.
TEST(CudaMoeExperts, CombineOfBf16Rows) {
  const int64_t T = 5, d = 37, K = 3, rows = 11;
  auto x = normal(size_t(rows * d), 1, 1), shared = normal(size_t(T * d), 1, 2),
       w = normal(size_t(T * K), 0.5, 3), y = normal(size_t(T * d), 1, 4);
  std::vector<int64_t> row(size_t(T * K));
  for (size_t i = 0; i < row.size(); ++i) row[i] = i == 4 ? -1 : int64_t(i * 7 % size_t(rows));
  const DeviceBuffer dx = put(x, DType::bf16), ds = put(shared, DType::bf16),
                     dw = put(w, DType::f32), drow = put_raw(row), dy = put(y, DType::bf16);
  for (const bool with_shared : {false, true}) {
    moe_experts_combine_cuda_simt(
        {T, d, K, DType::bf16, dx.data(), drow.as<int64_t>(), dw.as<float>(), dy.data()},
        DType::bf16, with_shared ? ds.data() : nullptr, cuda_stream());
    cuda_synchronize(cuda_stream());
    const auto got = get(dy, size_t(T * d), DType::bf16);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t j = 0; j < d; ++j) {
        float want = 0;
        for (int64_t k = 0; k < K; ++k)
          if (const int64_t r = row[size_t(t * K + k)]; r >= 0)
            want += float(w[size_t(t * K + k)]) * float(x[size_t(r * d + j)]);
        if (with_shared) want += float(shared[size_t(t * d + j)]);
        const double bound = 0x1p-8 * std::abs(double(want)) + 1e-6;
        EXPECT_TRUE(std::abs(got[size_t(t * d + j)] - double(want)) <= bound)
            << t << " " << j << " " << got[size_t(t * d + j)] << " " << want;
      }
  }
}

}  // namespace
}  // namespace v3b::kern
