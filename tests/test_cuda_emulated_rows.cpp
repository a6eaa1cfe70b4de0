// Norm, RoPE, SwiGLU, softmax, embedding, quantisation and cross-entropy kernels in the emulation: the ops' own cases,
// then what the ops do not reach (types, strides, forms, in place, fused quantisation, NaN, ties).
#include <cmath>
#include <functional>

#include "kernels/gemm/rows_cuda.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "model/error.h"
#include "model/rng.h"
#include "reference/cross_entropy.h"
#include "reference/fp8_quant.h"
#include "reference/rope.h"
#include "reference/softmax.h"
#include "tests/cuda_emulated.h"

namespace v3b::kern {
namespace {

using spec::bf16;
using spec::DType;
using testing::check_op;
using testing::device;
using testing::host;

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInf = std::numeric_limits<float>::infinity();

std::vector<float> normals(int64_t n, uint64_t seed, double scale = 1) {
  std::vector<float> v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); ++i)
    v[i] = static_cast<float>(scale * model::rng_normal({seed, 1}, i));
  return v;
}
std::vector<bf16> rounded(const std::vector<float>& v) {
  std::vector<bf16> r;
  for (const float x : v) r.push_back(spec::to_bf16(x));
  return r;
}

TEST(CudaRows, OpCases) {
  check_op("rmsnorm", "cuda_simt",
           {"T=3,d=7168,residual=true,dtype=bf16", "T=2,d=8320,residual=true,dtype=bf16",
            "T=2,d=8201,dtype=bf16", "T=2,d=512,norm_rounding=hf,dtype=bf16",
            "T=2,d=8200,residual=true,quant=true", "T=3,d=512,quant=true,act_scale=ue8m0"});
  check_op("embedding", "cuda_simt",
           {"T=3,d=7168,V=17,dtype=bf16", "T=3,d=37,V=17,dtype=bf16", "T=3,d=6,V=17,dtype=bf16"});
  check_op("rope", "cuda_simt",
           {"T=5,n_h=3,d_r=64,dtype=bf16", "T=5,n_h=3,d_r=64,dtype=f32",
            "T=5,n_h=3,d_r=64,rope_layout=hf_halfsplit,dtype=bf16", "T=2,n_h=2,d_r=512,dtype=f32",
            "T=2,n_h=2,d_r=500,dtype=bf16"});
  check_op("swiglu", "cuda_simt",
           {"T=3,m=2560,dtype=bf16", "T=3,m=2056,dtype=f32", "T=3,m=2056,quant=true"});
  check_op("softmax", "cuda_simt",
           {"T=9,n=256", "T=2,n=1024", "T=2,n=1025", "T=2,n=20003", "T=1,n=129280"});
  check_op(
      "fp8_quant", "cuda_simt",
      {"rows=3,cols=7168", "rows=130,cols=264,weight=true", "rows=3,cols=2176,act_scale=ue8m0"});
  check_op("topk_backward", "cuda_simt",
           {"T=37,E=256,K=8", "T=5,E=200,K=40", "T=37,E=256,K=8,ste=true"});
  check_op("lm_head_ce", "cuda_mma", {"T=3,d=64,V=9000"});
}

// Every form, direction, type, with and without positions, at strides, into another buffer and in place.
TEST(CudaRows, RopeFormsTypesStrides) {
  using spec::RopeForm;
  const int64_t T = 4, n_h = 3;
  for (const int64_t d_r : {16, 64, 24})
    for (const RopeForm form :
         {RopeForm::interleaved, RopeForm::interleaved_to_half, RopeForm::half})
      for (const int variant : {0, 1, 2, 3, 4, 5, 6, 7}) {
        const bool inverse = variant & 1, positions = variant & 2, in_place = variant & 4;
        const DType x_type = variant % 3 == 0 ? DType::f32 : DType::bf16,
                    y_type = in_place           ? x_type
                             : variant % 2 == 0 ? DType::f32
                                                : DType::bf16;
        const int64_t head = d_r + 8, token = n_h * head + 16, n = T * token, half = d_r / 2;
        std::vector<float> x = normals(n, 11);
        for (float& v : x) v = spec::to_float(spec::to_bf16(v));
        const std::vector<float> angle = normals(9 * half, 12, 3);
        std::vector<float> cos, sin;
        for (const float v : angle) cos.push_back(std::cos(v)), sin.push_back(std::sin(v));
        const std::vector<int32_t> pos{8, 0, 3, 3};
        const DeviceBuffer dx = x_type == DType::f32 ? device(x) : device(rounded(x));
        const DeviceBuffer dy(n * 4), dc = device(cos), ds = device(sin), dp = device(pos);
        rope_cuda_simt({T, n_h, d_r, form, inverse, x_type, y_type, dx.data(), token, head,
                        in_place ? dx.data() : dy.data(), token, head, dc.as<float>(),
                        ds.as<float>(), positions ? dp.as<int32_t>() : nullptr},
                       cuda_stream());
        const DeviceBuffer& out = in_place ? dx : dy;
        for (int64_t t = 0; t < T; ++t) {
          const int64_t p = positions ? pos[size_t(t)] : t;
          std::vector<double> c(cos.begin() + p * half, cos.begin() + (p + 1) * half),
              s(sin.begin() + p * half, sin.begin() + (p + 1) * half), y(static_cast<size_t>(d_r));
          for (int64_t h = 0; h < n_h; ++h) {
            const int64_t at = t * token + h * head;
            const std::vector<double> in(x.begin() + at, x.begin() + at + d_r);
            ref::rope<double>(1, 1, d_r, form, inverse, in.data(), c.data(), s.data(), y.data());
            for (int64_t i = 0; i < d_r; ++i) {
              const float got = y_type == DType::f32
                                    ? host<float>(out)[size_t(at + i)]
                                    : spec::to_float(host<bf16>(out)[size_t(at + i)]);
              const double want = y[size_t(i)];
              ASSERT_LE(std::abs(got - want),
                        (y_type == DType::f32 ? 1e-6 : 0x1p-8) * std::abs(want) + 1e-6)
                  << "d_r " << d_r << " form " << int(form) << " variant " << variant << " at " << t
                  << "," << h << "," << i;
            }
          }
        }
      }
  EXPECT_THROW(rope_cuda_simt({1, 1, 514}, cuda_stream()), Error);
}

// Fused quantisation has the bits of the two steps.
TEST(CudaRows, RmsNormQuantised) {
  const int64_t T = 3;
  for (const int64_t d : {7168, 8320, 8201, 200})
    for (const auto kind : {spec::ActScale::fp32, spec::ActScale::ue8m0}) {
      const DeviceBuffer x = device(rounded(normals(T * d, 21))),
                         w = device(rounded(normals(d, 22)));
      const DeviceBuffer r0 = device(rounded(normals(T * d, 23))), r1 = device(host<bf16>(r0));
      const DeviceBuffer y0(T * d * 2), y1(T * d * 2), codes(T * d),
          scales(T * spec::fp8_blocks(d) * 4);
      spec::RmsNormArgs a = {T,           d,        1e-6,      spec::NormRounding::single,
                             DType::bf16, x.data(), r0.data(), w.data(),
                             y0.data()};
      rmsnorm_cuda_simt(a, cuda_stream());
      a.residual = r1.data(), a.y = d == 200 ? nullptr : y1.data();
      rmsnorm_quant_cuda_simt(a, {codes.as<spec::f8e4m3>(), scales.as<float>(), kind},
                              cuda_stream());
      std::vector<double> y;
      for (const bf16 v : host<bf16>(y0)) y.push_back(spec::to_float(v));
      std::vector<spec::f8e4m3> want(y.size());
      std::vector<float> want_scales(static_cast<size_t>(T * spec::fp8_blocks(d)));
      ref::fp8_quantize_act<double>(T, d, y.data(), want.data(), want_scales.data(), kind);
      EXPECT_EQ(host<float>(scales), want_scales);
      const auto got = host<uint8_t>(codes);
      for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], want[i].bits) << d << " at " << i;
      const auto a0 = host<uint16_t>(r0), a1 = host<uint16_t>(r1);
      EXPECT_EQ(a0, a1);
      if (a.y != nullptr) {
        EXPECT_EQ(host<uint16_t>(y0), host<uint16_t>(y1));
      }
    }
}
TEST(CudaRows, SwigluTypesScalesAndQuantisation) {
  const int64_t T = 3;
  for (const int64_t m : {2176, 2053, 128})
    for (const int variant : {0, 1, 2, 3}) {
      const DType in = variant & 1 ? DType::f32 : DType::bf16,
                  out = variant & 2 ? DType::f32 : DType::bf16;
      const int64_t stride = 2 * m + 8, y_stride = m + 8;
      std::vector<float> x = normals(T * stride, 31, 3);
      for (float& v : x) v = spec::to_float(spec::to_bf16(v));
      const std::vector<float> scale{0.5f, -2.0f, 1.0f};
      const DeviceBuffer dx = in == DType::f32 ? device(x) : device(rounded(x)), ds = device(scale);
      const DeviceBuffer y(T * y_stride * 4), y2(T * y_stride * 4), codes(T * m),
          scales(T * spec::fp8_blocks(m) * 4);
      const int64_t e = spec::dtype_bytes(in);
      spec::SwigluArgs a = {
          T,        m,       in, out, dx.data(), dx.as<uint8_t>() + m * e, stride, ds.as<float>(),
          y.data(), y_stride};
      swiglu_cuda_simt(a, cuda_stream());
      a.y = variant == 3 ? nullptr : y2.data();
      swiglu_quant_cuda_simt(
          a, {codes.as<spec::f8e4m3>(), scales.as<float>(), spec::ActScale::fp32}, cuda_stream());
      const auto value = [&](const DeviceBuffer& b, int64_t i) {
        return out == DType::f32 ? host<float>(b)[size_t(i)]
                                 : spec::to_float(host<bf16>(b)[size_t(i)]);
      };
      const auto got_scales = host<float>(scales);
      const auto got_codes = host<uint8_t>(codes);
      for (int64_t t = 0; t < T; ++t) {
        std::vector<double> row;
        for (int64_t i = 0; i < m; ++i) {
          const double g = x[size_t(t * stride + i)], u = x[size_t(t * stride + m + i)];
          const double want = g / (1 + std::exp(-g)) * u * scale[size_t(t)];
          row.push_back(want);
        }
        std::vector<float> kernel(static_cast<size_t>(m));
        if (out == DType::f32) {
          const auto all = host<float>(y);
          std::copy_n(all.begin() + t * y_stride, m, kernel.begin());
        } else {
          const auto all = host<bf16>(y);
          for (int64_t i = 0; i < m; ++i)
            kernel[size_t(i)] = spec::to_float(all[size_t(t * y_stride + i)]);
        }
        for (int64_t i = 0; i < m; ++i)
          ASSERT_LE(std::abs(kernel[size_t(i)] - row[size_t(i)]),
                    (out == DType::f32 ? 1e-6 : 0x1p-8) * std::abs(row[size_t(i)]) + 1e-20)
              << m << " variant " << variant;
        const std::vector<double> wide(kernel.begin(), kernel.end());
        std::vector<spec::f8e4m3> want(static_cast<size_t>(m));
        std::vector<float> want_scales(static_cast<size_t>(spec::fp8_blocks(m)));
        ref::fp8_quantize_act<double>(1, m, wide.data(), want.data(), want_scales.data());
        for (int64_t b = 0; b < spec::fp8_blocks(m); ++b)
          ASSERT_EQ(got_scales[size_t(t * spec::fp8_blocks(m) + b)], want_scales[size_t(b)]);
        for (int64_t i = 0; i < m; ++i)
          ASSERT_EQ(got_codes[size_t(t * m + i)], want[size_t(i)].bits)
              << m << " " << variant << " " << i;
      }
      if (a.y != nullptr) {
        EXPECT_EQ(value(y, y_stride + 5), value(y2, y_stride + 5));
      }
    }
}

TEST(CudaRows, SoftmaxSpecialRows) {
  for (const int64_t n : {37, 1000, 9000}) {
    const int64_t T = 5, stride = n + 3;
    std::vector<float> x = normals(T * stride, 41, 4);
    x[size_t(1 * stride + n - 1)] = kNan;                                   // a NaN row
    for (int64_t i = 0; i + 5 < n; ++i) x[size_t(2 * stride + i)] = -kInf;  // whole parts of -inf
    x[size_t(3 * stride + 2)] = -kInf;
    for (const bool in_place : {false, true}) {
      const DeviceBuffer dx = device(x), dy(T * stride * 4), lse(T * 4);
      spec::SoftmaxArgs a = {T,      n,
                             0.7,    dx.as<float>(),
                             stride, in_place ? dx.as<float>() : dy.as<float>(),
                             stride, lse.as<float>()};
      const DeviceBuffer scratch(softmax_cuda_scratch_bytes(a));
      softmax_cuda_simt(a, scratch.data(), cuda_stream());
      const auto y = host<float>(in_place ? dx : dy), l = host<float>(lse);
      for (int64_t t = 0; t < T; ++t) {
        std::vector<double> row(x.begin() + t * stride, x.begin() + t * stride + n),
            want(row.size());
        double want_lse = 0;
        ref::softmax<double>(1, n, 0.7, row.data(), want.data(), &want_lse);
        if (t == 1) {
          EXPECT_TRUE(std::isnan(l[size_t(t)]));
          for (int64_t i = 0; i < n; ++i) ASSERT_TRUE(std::isnan(y[size_t(t * stride + i)]));
          continue;
        }
        EXPECT_NEAR(l[size_t(t)], want_lse, 4e-6);
        for (int64_t i = 0; i < n; ++i)
          ASSERT_NEAR(y[size_t(t * stride + i)], want[size_t(i)], 6e-6 * want[size_t(i)] + 1e-12);
      }
    }
    const DeviceBuffer dx = device(x), lse(T * 4);
    spec::SoftmaxArgs a = {T, n, 0.7, dx.as<float>(), stride, nullptr, 0, lse.as<float>()};
    const DeviceBuffer scratch(softmax_cuda_scratch_bytes(a));
    softmax_cuda_simt(a, scratch.data(), cuda_stream());
    std::vector<double> row(x.begin(), x.begin() + n);
    double want_lse = 0;
    ref::softmax<double>(1, n, 0.7, row.data(), nullptr, &want_lse);
    EXPECT_NEAR(host<float>(lse)[0], want_lse, 4e-6);
  }
}

TEST(CudaRows, CrossEntropyRows) {
  for (const int64_t V : {50, 5003, 9001}) {
    const int64_t T = 7, ldz = V + 3;
    std::vector<float> z = normals(T * ldz, 51, 3);
    std::vector<int64_t> labels{0, V - 1, spec::kIgnoreLabel, V / 2, 1, 2, 3};
    z[size_t(1 * ldz + 3)] = z[size_t(1 * ldz + V - 2)] = 50;  // equal largest: the lower index
    z[size_t(4 * ldz + V / 3)] = kNan;
    for (int64_t i = 0; i < V; ++i) z[size_t(5 * ldz + i)] = kNan;
    for (int64_t i = 9; i < V; ++i) z[size_t(6 * ldz + i)] = -kInf;
    const DeviceBuffer dz = device(z), dl = device(labels), nll(T * 4), lse(T * 4), arg(T * 4);
    const DeviceBuffer scratch(cross_entropy_rows_cuda_scratch_bytes(T, V));
    cross_entropy_rows_cuda_simt(T, V, dz.as<float>(), ldz, dl.as<int64_t>(), nll.as<float>(),
                                 lse.as<float>(), arg.as<int32_t>(), scratch.data(), cuda_stream());
    const auto n = host<float>(nll), l = host<float>(lse);
    const auto best = host<int32_t>(arg);
    for (int64_t t = 0; t < T; ++t) {
      std::vector<double> row(z.begin() + t * ldz, z.begin() + t * ldz + V);
      int32_t want_best = 0;
      for (int64_t i = 0; i < V; ++i)
        if (row[size_t(i)] > row[size_t(want_best)] || std::isnan(row[size_t(want_best)]))
          if (!std::isnan(row[size_t(i)])) want_best = int32_t(i);
      EXPECT_EQ(best[size_t(t)], want_best) << t;
      if (t == 4 || t == 5) {
        EXPECT_TRUE(std::isnan(l[size_t(t)]) && std::isnan(n[size_t(t)])) << t;
        continue;
      }
      const double want = ref::logsumexp<double>(V, row.data());
      EXPECT_NEAR(l[size_t(t)], want, 1e-6 * std::abs(want) + 2e-6);
      const int64_t label = labels[size_t(t)];
      EXPECT_NEAR(n[size_t(t)], label < 0 ? 0.0 : want - row[size_t(label)], 2e-5) << t;
    }
  }
}

}  // namespace
}  // namespace v3b::kern
