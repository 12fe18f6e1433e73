// Work shared out among threads. These are not equally quick: on a machine that others use too, one of them has half of
// its core for a while, and all would wait for it. So each thread has a run of units of its own, one after another, and
// once it is through with them it takes from the end of the run of which most is left: but for the last of it, which its
// own thread has asked memory for.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace unspool {

// The runs of some threads. A unit is given once.
class Runs {
 public:
  static constexpr int64_t NONE_LEFT = -1;

  Runs(int64_t units, int64_t threads) : runs_(threads) {
    for (int64_t t = 0; t < threads; ++t)
      runs_[t].left = {static_cast<uint32_t>(units * t / threads), static_cast<uint32_t>(units * (t + 1) / threads)};
  }

  // What a thread is to do next.
  int64_t next(int64_t thread) {
    for (Run* run = &runs_[thread]; run; run = longest()) {
      Units left = run->left;
      while (left.first < left.end) {
        const bool own = run == &runs_[thread];
        const Units rest{left.first + own, left.end - !own};
        if (run->left.compare_exchange_weak(left, rest)) return own ? left.first : rest.end;
      }
    }
    return NONE_LEFT;
  }

 private:
  struct alignas(8) Units {
    uint32_t first, end;
  };
  struct alignas(64) Run {  // a line of memory for each, as only its thread writes there for long
    std::atomic<Units> left;
  };

  Run* longest() {  // of those that something may be taken from
    Run* found = nullptr;
    uint32_t most = 1;
    for (Run& run : runs_) {
      const Units left = run.left;
      if (left.end - left.first > most) {
        most = left.end - left.first;
        found = &run;
      }
    }
    return found;
  }

  std::vector<Run> runs_;
};

// Room for some numbers, which stays as it was left unless more is asked for. It begins with a line of memory: what is
// read as lines would otherwise lie in two each.
template <typename T>
class Room {
 public:
  T* of(int64_t count) {
    if (count > count_) {
      count_ = count;
      const size_t bytes = (count * sizeof(T) + LINE - 1) / LINE * LINE;
      room_.reset(static_cast<T*>(std::aligned_alloc(LINE, bytes)));
    }
    return room_.get();
  }

 private:
  static constexpr size_t LINE = 64;  // bytes
  struct Free {
    void operator()(T* room) const { std::free(static_cast<void*>(room)); }
  };
  std::unique_ptr<T, Free> room_;
  int64_t count_ = 0;
};

// Do `what(unit, state)` for each unit. A thread has one state.
template <typename State, typename What>
void each(int64_t units, What what) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), units);
  Runs runs(units, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    State state;
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t unit; (unit = runs.next(thread)) != Runs::NONE_LEFT;) what(unit, state);
  });
}

// Do `what(unit)` for each unit.
template <typename What>
void each(int64_t units, What what) {
  struct Nothing {};
  each<Nothing>(units, [&](int64_t unit, Nothing) { what(unit); });
}

}  // namespace unspool
