// Type erasure of op.h: TypedOp<Op> implements OpBase through Op's static members.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bench/harness/op.h"

namespace v3b::bench {

template <class Op>
class TypedOp final : public OpBase {
 public:
  using Shape = typename Op::Shape;
  struct Held {
    Shape shape;
    std::unique_ptr<typename Op::Data> data;
  };
  explicit TypedOp(std::vector<Impl<Op>> extra) : impls_(Op::impls()) {
    for (auto& e : extra) impls_.push_back(std::move(e));
    add_levels();
  }

  std::string name() const override { return Op::name; }
  std::vector<CaseInfo> cases() const override {
    std::vector<CaseInfo> out;
    for (const auto& c : Op::cases()) out.push_back(info(c));
    return out;
  }
  CaseInfo parse_case(const std::string& text) const override {
    Case<Shape> c;
    c.shape = shape_from_text<Shape>(text, Op::name);
    reject_bad_sizes(c.shape);
    if constexpr (requires { Op::validate(c.shape); }) Op::validate(c.shape);
    return info(c);
  }
  std::vector<std::string> impls() const override {
    std::vector<std::string> out;
    for (const auto& i : impls_) out.push_back(i.how);
    return out;
  }
  bool is_baseline(const std::string& how) const override { return find(how).baseline; }
  Support support(const std::string& how, const std::string& text) const override {
    const auto& i = find(how);
    return i.support ? i.support(shape_from_text<Shape>(text, Op::name)) : Support{};
  }
  DataHandle make(const std::string& text, Fill fill, uint64_t seed) const override {
    auto held = std::make_shared<Held>();
    held->shape = shape_from_text<Shape>(text, Op::name);
    held->data = Op::make(held->shape, fill, seed);
    DataHandle h;
    h.tensors = held->data->tensors();
    h.data = std::move(held);
    return h;
  }
  Runner prepare(const std::string& how, DataHandle& h) const override {
    return find(how).prepare(*static_cast<Held*>(h.data.get())->data);
  }
  Expected reference(const DataHandle& h) const override {
    return Op::reference(*static_cast<const Held*>(h.data.get())->data);
  }
  Cost cost(const std::string& text) const override {
    return Op::cost(shape_from_text<Shape>(text, Op::name));
  }
  Tolerance tolerance(const std::string& text, Fill fill,
                      const std::string& output) const override {
    return Op::tolerance(shape_from_text<Shape>(text, Op::name), fill, output);
  }
  Tolerance tolerance_of(const std::string& how, const std::string& text, Fill fill,
                         const std::string& output) const override {
    const auto& i = find(how);
    return i.tolerance ? i.tolerance(shape_from_text<Shape>(text, Op::name), fill, output)
                       : tolerance(text, fill, output);
  }
  // Ops whose sums can be made exact declare `static constexpr bool exact_fill = true`.
  bool has_exact_fill(const std::string&) const override {
    if constexpr (requires { Op::exact_fill; }) return Op::exact_fill;
    return false;
  }

 private:
  // Rules for every op; Op::validate adds its own. A size below 1 is allowed for a key only as far down as
  // the op's own cases or defaults go (s0 = 0, say), one beyond 32 bits never; types are those of the cases.
  static void reject_bad_sizes(const Shape& given) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    std::map<std::string, int64_t> least;
    std::map<std::string, std::set<spec::DType>> types;
    const auto collect = [&](const Shape& s) {
      Shape::visit(s, [&](const char* key, const auto& v) {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, int64_t>)
          least[key] = std::min({least.try_emplace(key, 1).first->second, v});
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, spec::DType>) types[key].insert(v);
      });
    };
    collect(Shape{});
    for (const auto& c : Op::cases()) collect(c.shape);
    const std::string where = std::string("--case of ") + Op::name;
    Shape::visit(given, [&](const char* key, const auto& v) {
      const std::string name = std::string("'") + key + "'";
      if constexpr (std::is_same_v<std::decay_t<decltype(v)>, int64_t>) {
        if (v < least.at(key))
          throw Error(ExitCode::usage, name + " is too small", where,
                      "at least " + std::to_string(least.at(key)), std::to_string(v));
        if (v > kMost)
          throw Error(ExitCode::usage, name + " is too large", where,
                      "at most " + std::to_string(kMost), std::to_string(v));
      }
      if constexpr (std::is_same_v<std::decay_t<decltype(v)>, double>)
        if (!std::isfinite(v))
          throw Error(ExitCode::usage, name + " is no number", where, "a finite one",
                      field_to_text(v));
      if constexpr (std::is_same_v<std::decay_t<decltype(v)>, spec::DType>)
        if (types.at(key).count(v) == 0) {
          std::string known;
          for (const auto t : types.at(key))
            known += (known.empty() ? "" : ", ") + std::string(spec::dtype_name(t));
          throw Error(ExitCode::usage, name + " has no such type", where, known,
                      spec::dtype_name(v));
        }
    });
  }
  static CaseInfo info(const Case<Shape>& c) {
    CaseInfo i;
    i.text = shape_to_text(c.shape);
    i.size = c.size;
    i.check_only = c.check_only;
    i.cache = c.cache;
    Shape::visit(c.shape, [&](const char* key, const auto& v) {
      if (std::string(key) == "dtype") i.dtype = field_to_text(v);
    });
    return i;
  }
  // Behind each implementation with levels, one for each of them but the level that it runs at here by itself.
  void add_levels() {
    std::vector<Impl<Op>> all;
    for (const auto& base : impls_) {
      all.push_back(base);
      if (base.levels.empty()) continue;
      const kern::Isa own =
          std::min(kern::best_isa(), *std::max_element(base.levels.begin(), base.levels.end()));
      for (const kern::Isa level : base.levels)
        if (level != own) all.push_back(at_level(base, level));
    }
    impls_ = std::move(all);
  }
  static Impl<Op> at_level(const Impl<Op>& base, kern::Isa level) {
    Impl<Op> one = base;
    one.levels.clear();
    one.how += std::string("@") + kern::isa_name(level);
    one.support = [base, level](const Shape& s) {
      if (level > kern::best_isa())
        return Support{Support::State::unsupported,
                       std::string("this CPU has no ") + kern::isa_name(level)};
      const kern::IsaCap cap(level);
      return base.support ? base.support(s) : Support{};
    };
    one.prepare = [base, level](typename Op::Data& d) {
      const kern::IsaCap cap(level);
      Runner r = base.prepare(d);
      r.run = [run = std::move(r.run), level] {
        const kern::IsaCap inner(level);
        run();
      };
      return r;
    };
    return one;
  }
  const Impl<Op>& find(const std::string& how) const {
    for (const auto& i : impls_)
      if (i.how == how) return i;
    throw Error(ExitCode::usage, "unknown implementation '" + how + "'", Op::name);
  }
  std::vector<Impl<Op>> impls_;
};

template <class Op>
std::unique_ptr<OpBase> make_op(std::vector<Impl<Op>> extra) {
  return std::make_unique<TypedOp<Op>>(std::move(extra));
}

}  // namespace v3b::bench
