// The rates that this processor reaches: bytes moved by a triad, and exponentials of csrc/cpu/vector.h.  harness/ceilings.py
// compiles this file for the instruction set of the kernels.
#include "cpu/vector.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace kcd {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Runs body(thread) on `threads` threads, including this one.
template <class Body>
void on_threads(int threads, const Body& body) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
  body(0);
  for (std::thread& other : others) other.join();
}

// Blocks until every thread has called wait() as often as this one.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait(int64_t& times) {
    ++times;
    ++arrived_;
    while (arrived_ < times * threads_) std::this_thread::yield();
  }

 private:
  const int64_t threads_;
  std::atomic<int64_t> arrived_{0};
};

template <bool streaming>
void add(const float* a, const float* b, float* c, int64_t n) {
  int64_t j = 0;
  for (; j < n && (streaming && elements_to_alignment(c + j, KCD_VECTOR_BYTES)); ++j) c[j] = a[j] + b[j];
  for (; j + kLanes<float> <= n; j += kLanes<float>) {
    const Vector<float> sum = load(a + j) + load(b + j);
    streaming ? stream(c + j, sum) : store(c + j, sum);
  }
  for (; j < n; ++j) c[j] = a[j] + b[j];
  stream_fence();
}

// Returns the median seconds of several repetitions.
template <bool streaming>
double triad(const float* a, const float* b, float* c, int64_t n, int threads, int repetitions) {
  std::vector<double> seconds(static_cast<size_t>(repetitions));
  Barrier barrier(threads);
  on_threads(threads, [&](int thread) {
    const int64_t begin = n / threads * thread, end = thread + 1 == threads ? n : n / threads * (thread + 1);
    int64_t times = 0;
    for (double& taken : seconds) {
      barrier.wait(times);
      const Clock::time_point start = Clock::now();
      add<streaming>(a + begin, b + begin, c + begin, end - begin);
      barrier.wait(times);
      if (thread == 0) taken = seconds_since(start);
    }
  });
  std::nth_element(seconds.begin(), seconds.begin() + repetitions / 2, seconds.end());
  return seconds[static_cast<size_t>(repetitions / 2)];
}

template <class Real>
double exponentials(int threads, double seconds) {
  constexpr int64_t kElements = 8192 / sizeof(Real);   // with the results, half of a first-level cache
  constexpr int kTimes = 64;
  std::vector<double> rates(static_cast<size_t>(threads));
  on_threads(threads, [&](int thread) {
    alignas(64) Real x[kElements], y[kElements];
    for (int64_t j = 0; j < kElements; ++j) x[j] = static_cast<Real>(-20) * static_cast<Real>(j) / kElements;
    const Clock::time_point start = Clock::now();
    double taken = 0, done = 0;
    for (; taken < seconds; taken = seconds_since(start), done += kTimes * kElements)
      for (int k = 0; k < kTimes; ++k) {
        for (int64_t j = 0; j < kElements; j += kLanes<Real>) store<Real>(y + j, exp2(load(x + j)));
        __asm__ volatile("" : : "r"(x), "r"(y) : "memory");
      }
    rates[static_cast<size_t>(thread)] = done / taken;
  });
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

}   // namespace
}   // namespace kcd

// Returns the seconds of c = a + b, with stores through the caches or past them, whichever is faster.
extern "C" double triad_seconds(const float* a, const float* b, float* c, int64_t n, int threads, int repetitions) {
  return std::min(kcd::triad<false>(a, b, c, n, threads, repetitions), kcd::triad<true>(a, b, c, n, threads, repetitions));
}

// Returns the rate of all threads together, measured for about `seconds` seconds.
extern "C" double exponentials_per_second(bool in_double, int threads, double seconds) {
  return in_double ? kcd::exponentials<double>(threads, seconds) : kcd::exponentials<float>(threads, seconds);
}
