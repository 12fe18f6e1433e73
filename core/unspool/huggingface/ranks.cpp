// The best of each row, and the greatest beside a copy, in one reading.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "vectors.h"
#include "work.h"

namespace {

using namespace unspool;

constexpr int64_t SPARE = 64;  // numbers that are kept beside the best before they are compared

struct Ranked {
  float value;
  int64_t place;

  bool operator<(const Ranked& other) const {  // the better one is less
    return value > other.value || (value == other.value && place < other.place);
  }
};

// The places of the `count` largest of n numbers, best first; of equal ones the first come first. Only numbers above the
// worst of the best so far are looked at again.
void rank(const float* values, int64_t n, int64_t count, std::vector<Ranked>& kept, int64_t* to) {
  kept.clear();
  float least = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    kept.push_back({values[i] == values[i] ? values[i] : NONE, i});  // a NaN has no rank
    least = std::min(least, kept.back().value);
  }
  const size_t most = 2 * count + SPARE;
  for (int64_t i = count; i < n; i += W) {
    const Vector v = some(values + i, n - i, NONE);
    if (!any(v > all(least))) continue;
    for (int lane = 0; lane < W; ++lane)
      if (v[lane] > least) kept.push_back({v[lane], i + lane});
    if (kept.size() < most) continue;
    std::nth_element(kept.begin(), kept.begin() + count - 1, kept.end());
    kept.resize(count);
    least = kept.back().value;
  }
  std::partial_sort(kept.begin(), kept.begin() + count, kept.end());
  for (int64_t i = 0; i < count; ++i) to[i] = kept[i].place;
}

// values [n, m] float32, a NaN as low as can be: the places of the `count` largest of each row, [n, count].
at::Tensor best(const at::Tensor& values_, int64_t count) {
  const at::Tensor values = values_.contiguous();
  TORCH_CHECK(values.dim() == 2 && values.scalar_type() == at::kFloat, "unspool::best takes [n, m] of float32, not ",
              values.sizes(), " of ", values.scalar_type());
  const int64_t rows = values.size(0), width = values.size(1);
  TORCH_CHECK(count > 0 && count <= width, "unspool::best finds from 1 to ", width, " of them, not ", count);
  const float* from = values.const_data_ptr<float>();
  at::Tensor places = at::empty({rows, count}, values.options().dtype(at::kLong));
  int64_t* to = places.mutable_data_ptr<int64_t>();
  each<std::vector<Ranked>>(rows, [&](int64_t row, std::vector<Ranked>& kept) {
    rank(from + row * width, width, count, kept, to + row * count);
  });
  return places;
}

// Copy n numbers as float32, and give the greatest; NaN if there is one.
template <typename T>
float widen(const T* from, int64_t n, float* to) {
  Vector tops = all(NONE);
  Whole strange{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vector v = Element<T>::load(from + i);
    *reinterpret_cast<Loose*>(to + i) = v;
    tops = v > tops ? v : tops;
    strange |= v != v;
  }
  float top = joined(tops, [](auto a, auto b) { return a > b ? a : b; });
  bool is_strange = any(strange);
  for (; i < n; ++i) {
    to[i] = Element<T>::one(from + i);
    top = std::max(top, to[i]);
    is_strange |= to[i] != to[i];
  }
  return is_strange ? std::numeric_limits<float>::quiet_NaN() : top;
}

// values [n, m]: a copy in float32, and the greatest of each row.
std::tuple<at::Tensor, at::Tensor> widened(const at::Tensor& values_) {
  const at::Tensor values = values_.contiguous();
  TORCH_CHECK(values.dim() == 2, "unspool::widened takes [n, m], not ", values.sizes());
  const int64_t rows = values.size(0), width = values.size(1);
  at::Tensor copy = at::empty({rows, width}, values.options().dtype(at::kFloat)), tops = at::empty({rows}, copy.options());
  float *to = copy.mutable_data_ptr<float>(), *top = tops.mutable_data_ptr<float>();
  auto with = [&](auto dtype) {
    const auto* from = values.const_data_ptr<decltype(dtype)>();
    each(rows, [&](int64_t row) { top[row] = widen(from + row * width, width, to + row * width); });
  };
  by_dtype(values.scalar_type(), "unspool::widened takes", with);
  return {copy, tops};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.def("best(Tensor values, int count) -> Tensor");
  library.def("widened(Tensor values) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(unspool, CPU, library) {
  library.impl("best", best);
  library.impl("widened", widened);
}
