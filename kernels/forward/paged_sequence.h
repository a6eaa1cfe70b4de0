// A sequence of the CPU and CUDA backends: its pages in the main model's cache and in the MTP module's.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "kernels/forward/page_pool.h"
#include "model/backend.h"
#include "model/error.h"
#include "model/rope_table.h"

namespace v3b::kern {

class PagedSequence final : public model::Sequence {
 public:
  PagedSequence(std::shared_ptr<PagePool> main_pool, std::shared_ptr<PagePool> mtp_pool)
      : main(std::move(main_pool)), mtp(std::move(mtp_pool)) {}
  int64_t length() const override { return main.length(); }
  int64_t mtp_length() const override { return mtp.length(); }
  void truncate(int64_t n) override { cut(main, n); }
  void mtp_truncate(int64_t n) override { cut(mtp, n); }
  int64_t cache_bytes() const override { return main.bytes() + mtp.bytes(); }

  PagedTrack main, mtp;
  // Of the rotated keys in `main` and `mtp`; meaningful when one is not empty.
  model::RopeFreqs freqs;

 private:
  static void cut(PagedTrack& t, int64_t n) {
    if (n < 0 || n > t.length())
      throw Error(ExitCode::usage, "cannot truncate a cache", "sequence",
                  "0.." + std::to_string(t.length()), std::to_string(n));
    t.shrink(n);
  }
};

}  // namespace v3b::kern
