// Tiles: registers of 16 rows of 64 bytes, two of which the processor multiplies at once (Intel AMX).
//
// Of two tiles the one holds rows, 32 bfloat16 numbers of each, the other the pairs of those places of 16 columns. Up to two
// tiles of rows are multiplied with two of columns at once: four tiles of sums, all that there are registers for.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define UNSPOOL_TILES

#include <c10/util/BFloat16.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace unspool::tiles {

constexpr int64_t ROWS = 16;           // of a tile
constexpr int64_t BYTES = 64;          // of a row of it
constexpr int64_t SIZE = ROWS * BYTES;
constexpr int64_t DEEP = BYTES / 2;    // bfloat16 numbers in a row
constexpr int64_t COLUMNS = BYTES / 4; // sums in a row

// Ask the system, once, whether this process may use them: they make what it saves of a thread larger.
inline bool granted() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool is = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return is;
}

// What was written before is in memory from here on: tiles are loaded, and shaped, behind the compiler's back.
inline void written() { __asm__ volatile("" ::: "memory"); }

// The tiles of this thread while something is multiplied, shaped for some rows: sums in 0 to 3, rows in 4 and 5, columns in
// 6 and 7. Whoever had them before has to shape them again.
class Shaped {
 public:
  Shaped() = default;
  Shaped(const Shaped&) = delete;
  Shaped& operator=(const Shaped&) = delete;
  ~Shaped() {
    if (rows_) _tile_release();
  }

  void hold(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    Shape shape;
    for (int t = 0; t < 8; ++t) shape.bytes[t] = BYTES;
    const auto first = static_cast<uint8_t>(std::min(rows, ROWS)), second = static_cast<uint8_t>(rows - first);
    for (int t : {0, 1, 4}) shape.rows[t] = first;
    for (int t : {2, 3, 5}) shape.rows[t] = std::max<uint8_t>(second, 1);
    for (int t : {6, 7}) shape.rows[t] = ROWS;
    written();
    _tile_loadconfig(&shape);
  }

 private:
  struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Shape) == 64);
  int64_t rows_ = 0;
};

// Begin sums with zeros.
inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Take the tiles of columns at two places, whose rows are so many bytes apart.
inline void take(const void* columns, const void* next, int64_t bytes) {
  _tile_loadd(6, columns, bytes);
  _tile_loadd(7, next, bytes);
}

// Add the products of rows, `step` numbers apart, with the tiles of columns that were taken. `second`: there are more rows
// than one tile holds.
inline void multiply(const c10::BFloat16* rows, int64_t step, bool second) {
  _tile_loadd(4, rows, step * sizeof *rows);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (second) {
    _tile_loadd(5, rows + ROWS * step, step * sizeof *rows);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The same with two tiles of columns, one behind the other, that are taken on the way. `passing`: the rows need not stay
// in the first cache.
inline void multiply(const char* columns, const c10::BFloat16* rows, int64_t step, bool second, bool passing) {
  const int64_t bytes = step * sizeof *rows;
  _tile_loadd(6, columns, BYTES);
  if (passing)
    _tile_stream_loadd(4, rows, bytes);
  else
    _tile_loadd(4, rows, bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, columns + SIZE, BYTES);
  _tile_dpbf16ps(1, 4, 7);
  if (!second) return;
  if (passing)
    _tile_stream_loadd(5, rows + ROWS * step, bytes);
  else
    _tile_loadd(5, rows + ROWS * step, bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Go on with sums that were kept, rows `step` numbers apart.
inline void resume(const float* sums, int64_t step, bool second) {
  _tile_loadd(0, sums, step * sizeof *sums);
  _tile_loadd(1, sums + COLUMNS, step * sizeof *sums);
  if (second) {
    _tile_loadd(2, sums + ROWS * step, step * sizeof *sums);
    _tile_loadd(3, sums + ROWS * step + COLUMNS, step * sizeof *sums);
  }
}

// Write sums down.
inline void keep(float* sums, int64_t step, bool second) {
  _tile_stored(0, sums, step * sizeof *sums);
  _tile_stored(1, sums + COLUMNS, step * sizeof *sums);
  if (second) {
    _tile_stored(2, sums + ROWS * step, step * sizeof *sums);
    _tile_stored(3, sums + ROWS * step + COLUMNS, step * sizeof *sums);
  }
}

}  // namespace unspool::tiles
#endif

namespace unspool {

// Whether this process multiplies by tiles.
inline bool in_tiles() {
#if defined(UNSPOOL_TILES)
  return tiles::granted();
#else
  return false;
#endif
}

}  // namespace unspool
