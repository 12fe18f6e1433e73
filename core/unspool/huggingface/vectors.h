// Vectors of float32 as wide as the processor has them, how they are loaded and stored in each dtype, functions of them, and
// products of pairs of bfloat16 numbers where it has those.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace unspool {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;  // two bfloat16 numbers are multiplied with two others at once
#else
constexpr bool PAIRS = false;
#endif
constexpr float NONE = -std::numeric_limits<float>::infinity();
typedef float Vector __attribute__((vector_size(W * 4)));
typedef float Loose __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(W * 4)));
typedef uint32_t Word __attribute__((vector_size(W * 4)));
typedef uint16_t Half __attribute__((vector_size(W * 2)));

// Round to bfloat16, to the nearest.
inline Half halved(Vector v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Half>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const Word bits = reinterpret_cast<Word>(v), nearest = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector((v == v ? nearest : bits | 0x400000) >> 16, Half);
#endif
}

template <typename T>
struct Element;

template <>
struct Element<float> {
  static Vector load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
  static float one(const float* p) { return *p; }
  static void store(float* p, Vector v) { *reinterpret_cast<Loose*>(p) = v; }
  static float rounded(float x) { return x; }
};

template <>
struct Element<c10::BFloat16> {
  static Vector load(const c10::BFloat16* p) {
#if defined(__AVX512F__)  // which GCC 12 does in halves
    const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return reinterpret_cast<Vector>(_mm512_slli_epi32(word, 16));
#else
    Half half;
    std::memcpy(&half, p, sizeof half);
    return reinterpret_cast<Vector>(__builtin_convertvector(half, Word) << 16);
#endif
  }
  static float one(const c10::BFloat16* p) { return static_cast<float>(*p); }
  static void store(c10::BFloat16* p, Vector v) {
    const Half half = halved(v);
    std::memcpy(static_cast<void*>(p), &half, sizeof half);
  }
  static c10::BFloat16 rounded(float x) { return c10::BFloat16(x); }
};

template <>
struct Element<c10::Half> {
  static Vector load(const c10::Half* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
    Vector out;
    for (int i = 0; i < W; ++i) out[i] = static_cast<float>(p[i]);
    return out;
#endif
  }
  static float one(const c10::Half* p) { return static_cast<float>(*p); }
  static void store(c10::Half* p, Vector v) {
    for (int i = 0; i < W; ++i) p[i] = c10::Half(v[i]);
  }
  static c10::Half rounded(float x) { return c10::Half(x); }
};

// Call something with a number of the dtype, if there are vectors of it; `who` refuses others.
template <typename With>
void by_dtype(c10::ScalarType dtype, const char* who, With with) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return with(float{});
    case c10::ScalarType::BFloat16:
      return with(c10::BFloat16{});
    case c10::ScalarType::Half:
      return with(c10::Half{});
    default:
      TORCH_CHECK(false, who, " float32, bfloat16 and float16, not ", dtype);
  }
}

inline Vector all(float x) { return x - Vector{}; }  // unlike 0 + x, nothing is left of it but the copies

// 0, 1, ...
inline Whole lanes() {
  Whole numbers;
  for (int i = 0; i < W; ++i) numbers[i] = i;
  return numbers;
}

// Up to W numbers, and something else where there are no more.
template <typename T>
inline Vector some(const T* from, int64_t left, float otherwise) {
  if (left >= W) return Element<T>::load(from);
  Vector v = all(otherwise);
  for (int64_t i = 0; i < left; ++i) v[i] = Element<T>::one(from + i);
  return v;
}

// Whether it is true of any number.
inline bool any(Whole truth) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(truth), reinterpret_cast<__m512i>(truth));
#else
  bool found = false;
  for (int i = 0; i < W; ++i) found |= truth[i] != 0;
  return found;
#endif
}

// exp(x) for x <= 0 to within 2 units in the last place; below -87 it is 0. (Where a result is less than all normal numbers,
// some processors take twenty times as long.)
inline Vector exponential(Vector x) {
#if defined(__AVX512F__)
  const auto lowest = _mm512_set1_ps(-87.0f), given = reinterpret_cast<__m512>(x);
  const __mmask16 normal = _mm512_cmp_ps_mask(given, lowest, _CMP_NLT_UQ);  // or no number
  const Vector kept = reinterpret_cast<Vector>(_mm512_max_ps(lowest, given));
  const __m512 log = reinterpret_cast<__m512>(kept * 1.44269504088896341f);
  const Vector whole = reinterpret_cast<Vector>(_mm512_roundscale_ps(log, _MM_FROUND_TO_NEAREST_INT));
#else
  const Whole tiny = x < all(-87.0f);
  const Vector kept = tiny ? all(-87.0f) : x;
  const Whole power = __builtin_convertvector(kept * 1.44269504088896341f - 0.5f, Whole);  // x <= 0: rounds to nearest
  const Vector whole = __builtin_convertvector(power, Vector);
#endif
  Vector r = kept - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  Vector y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(whole)));
#else
  const Whole bits = reinterpret_cast<Whole>(y) + (power << 23);
  return tiny ? Vector{} : reinterpret_cast<Vector>(bits);
#endif
}

// log(x) for normal x above 0, to within 2 units in the last place where it is not next to 0.
inline Vector logarithm(Vector x) {
  const Whole bits = reinterpret_cast<Whole>(x);
  Vector fraction = reinterpret_cast<Vector>((bits & 0x7fffff) | 0x3f800000);  // from 1 to 2
  const Whole large = fraction > all(1.41421356237f);
  fraction = large ? fraction * 0.5f : fraction;
  const Vector power = __builtin_convertvector((bits >> 23) - 127 - large, Vector);  // true is -1
  const Vector r = fraction - 1.0f, square = r * r;
  Vector y = all(7.0376836292e-2f);
  y = y * r - 1.1514610310e-1f;
  y = y * r + 1.1676998740e-1f;
  y = y * r - 1.2420140846e-1f;
  y = y * r + 1.4249322787e-1f;
  y = y * r - 1.6668057665e-1f;
  y = y * r + 2.0000714765e-1f;
  y = y * r - 2.4999993993e-1f;
  y = y * r + 3.3333331174e-1f;
  y = y * r * square - power * 2.12194440e-4f - square * 0.5f;
  return r + y + power * 0.693359375f;
}

// Join all numbers of a vector by an operation on two vectors.
template <typename V, typename Join>
inline auto joined(V v, Join join) {
#if defined(__AVX512F__)
  auto half = join(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  auto half = v;
#endif
  auto four = join(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
  auto two = join(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
  return join(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}

// The same for each of N vectors. Of 16 each step joins halves of two, side by side.
template <int N, typename Join>
inline Vector joined_each(const Vector* v, Join join) {
  if constexpr (N < 16) {
    Vector out{};
    for (int i = 0; i < N; ++i) out[i] = joined(v[i], join);
    return out;
  }
#if defined(__AVX512F__)
  Vector four[4];
  for (int m = 0; m < 4; ++m) {
    auto halves = [&](Vector a, Vector b) {
      return join(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                  __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    };
    const Vector a = halves(v[m], v[4 + m]), b = halves(v[8 + m], v[12 + m]);
    four[m] = join(__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                   __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
  }
  auto twos = [&](Vector a, Vector b) {
    return join(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  };
  const Vector a = twos(four[0], four[1]), b = twos(four[2], four[3]);
  return join(__builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30),
              __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31));
#endif
}

inline float sum(Vector v) {
  return joined(v, [](auto a, auto b) { return a + b; });
}

template <int N>
inline Vector sums(const Vector* v) {
  return joined_each<N>(v, [](auto a, auto b) { return a + b; });
}

template <int N>
inline Vector greatests(const Vector* v) {
  return joined_each<N>(v, [](auto a, auto b) { return a > b ? a : b; });
}

#if defined(__AVX512BF16__)
// Add to each number the products of the two pairs at its place of `a` and `b`, 32 bfloat16 numbers each.
inline Vector paired(Vector total, __m512i a, __m512i b) {
  const auto left = reinterpret_cast<__m512bh>(a), right = reinterpret_cast<__m512bh>(b);
  return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total), left, right));
}

inline Vector paired(Vector total, const void* a, const void* b) {
  return paired(total, _mm512_loadu_si512(a), _mm512_loadu_si512(b));
}
#endif

}  // namespace unspool
