// The only file that knows threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastopt {

#if defined(_OPENMP)
inline constexpr bool kOpenMP = true;
#else
inline constexpr bool kOpenMP = false;
#endif

namespace threads {

inline std::atomic<int> wanted{0};         // 0: not set, OpenMP's default (which honours OMP_NUM_THREADS)
inline std::atomic<bool> in_child{false};  // libgomp's workers do not survive fork: a child that calls them hangs

// Waking a thread costs up to some 30 us, and far more while other processes keep the cores busy; in that time a core
// moves about this many bytes.
inline constexpr double kBytesPerThread = 1024 * 1024;

inline void watch_fork() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { in_child.store(true); });
#endif
}

}  // namespace threads

inline int num_threads() {
#if defined(_OPENMP)
  if (threads::in_child.load()) return 1;
  const int wanted = threads::wanted.load();
  return wanted > 0 ? wanted : omp_get_max_threads();
#else
  return 1;
#endif
}

inline void set_num_threads(int n) { threads::wanted.store(n); }

// Calls body(begin, end) on adjoining ranges that cover [0, n), one a thread; on one range where the work, which
// moves about `bytes`, does not pay for waking threads. Body must not throw. Where its results depend on how the
// range is cut, let it work in fixed chunks and pass their number as n: then any number of threads gives the same.
template <class Body>
void parallel_for(std::size_t n, double bytes, const Body& body) noexcept {
  if (n == 0) return;
  const double useful = std::min(bytes / threads::kBytesPerThread, static_cast<double>(n));
  const int team = useful < 2 ? 1 : static_cast<int>(std::min(useful, static_cast<double>(num_threads())));
  if (team <= 1) {
    body(std::size_t{0}, n);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(team)
  {
    // The runtime may grant fewer threads than were asked for.
    const std::size_t count = static_cast<std::size_t>(omp_get_num_threads());
    const std::size_t me = static_cast<std::size_t>(omp_get_thread_num());
    const std::size_t share = n / count, rest = n % count;
    const std::size_t begin = me * share + std::min(me, rest);
    const std::size_t end = begin + share + (me < rest ? 1 : 0);
    if (begin < end) body(begin, end);
  }
#endif
}

}  // namespace fastopt
