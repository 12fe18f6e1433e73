// The largest cosine between vectors and those of a path, without writing the products down.
//
// Every product is summed in the same order, whatever others there are: equal vectors tie.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"
#include "work.h"

namespace {

using namespace unspool;

constexpr int64_t PLACES = 64;  // of a path that a core looks at in one go
constexpr int MANY = 4;         // candidates that are multiplied with what was loaded once
constexpr float LEAST = 1e-12f;  // norm of a vector that has a direction

inline float larger(float a, float b) { return b > a || b != b ? b : a; }  // a NaN is kept

template <int N, typename T>
void multiply(const float* candidates, const T* state, int64_t width, float* products) {
  Vector sums[N] = {};
  for (int64_t i = 0; i < width; i += W) {
    const Vector x = some(state + i, width - i, 0.0f);
    for (int k = 0; k < N; ++k) sums[k] += some(candidates + k * width + i, width - i, 0.0f) * x;
  }
  for (int k = 0; k < N; ++k) products[k] = sum(sums[k]);
}

template <typename T>
float norm(const T* state, int64_t width) {
  Vector squares{};
  for (int64_t i = 0; i < width; i += W) {
    const Vector x = some(state + i, width - i, 0.0f);
    squares += x * x;
  }
  const float found = std::sqrt(sum(squares));
  return found < LEAST ? LEAST : found;
}

// Join to `found` [k] the products of each candidate [k, width] with the directions of some places of a path.
template <typename T>
void look(const float* candidates, int64_t k, const T* path, const bool* there, int64_t places, int64_t width,
          float* found) {
  std::vector<float> products(k);
  for (int64_t j = 0; j < places; ++j) {
    if (!there[j]) continue;
    const T* state = path + j * width;
    int64_t i = 0;
    for (; i + MANY <= k; i += MANY) multiply<MANY>(candidates + i * width, state, width, products.data() + i);
    for (; i < k; ++i) multiply<1>(candidates + i * width, state, width, products.data() + i);
    const float size = norm(state, width);
    for (i = 0; i < k; ++i) found[i] = larger(found[i], products[i] / size);
  }
}

// candidates [n, k, width] float32, path [n, longest, width], there [n, longest] bool: [n, k].
at::Tensor nearest(const at::Tensor& candidates_, const at::Tensor& path_, const at::Tensor& there_) {
  const at::Tensor candidates = candidates_.contiguous(), path = path_.contiguous(), there = there_.contiguous();
  TORCH_CHECK(candidates.dim() == 3 && path.dim() == 3 && candidates.size(0) == path.size(0) &&
                  candidates.size(2) == path.size(2) && there.sizes() == path.sizes().slice(0, 2),
              "unspool::nearest takes [n, k, width], [n, longest, width] and [n, longest], not ", candidates.sizes(), ", ",
              path.sizes(), " and ", there.sizes());
  TORCH_CHECK(candidates.scalar_type() == at::kFloat && there.scalar_type() == at::kBool,
              "unspool::nearest takes float32 candidates and a mask of bool, not ", candidates.scalar_type(), " and ",
              there.scalar_type());
  const int64_t n = candidates.size(0), k = candidates.size(1), width = candidates.size(2), longest = path.size(1);
  const int64_t parts = (longest + PLACES - 1) / PLACES;
  const float* from = candidates.const_data_ptr<float>();
  const bool* mask = there.const_data_ptr<bool>();
  std::vector<float> found(n * parts * k, NONE);
  auto with = [&](auto dtype) {
    using T = decltype(dtype);
    const T* states = path.const_data_ptr<T>();
    each(n * parts, [&](int64_t part) {
      const int64_t row = part / parts, first = row * longest + part % parts * PLACES;
      const int64_t places = std::min(PLACES, (row + 1) * longest - first);
      look(from + row * k * width, k, states + first * width, mask + first, places, width, found.data() + part * k);
    });
  };
  by_dtype(path.scalar_type(), "unspool::nearest takes paths of", with);
  at::Tensor output = at::empty({n, k}, candidates.options());
  float* to = output.mutable_data_ptr<float>();
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) {
      float most = NONE;
      for (int64_t part = row * parts; part < (row + 1) * parts; ++part) most = larger(most, found[part * k + i]);
      to[row * k + i] = most / norm(from + (row * k + i) * width, width);
    }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unspool, library) {
  library.def("nearest(Tensor candidates, Tensor path, Tensor there) -> Tensor");
}

TORCH_LIBRARY_IMPL(unspool, CPU, library) { library.impl("nearest", nearest); }
