// Threads: no other file knows how the work is spread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastopt {

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

#if defined(_OPENMP)
inline constexpr bool kOpenMP = true;
#else
inline constexpr bool kOpenMP = false;
#endif

namespace threads {

inline constexpr int kMost = 4096;         // of set_num_threads() and OMP_NUM_THREADS
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

#if defined(_OPENMP)
// Returns true if the system lets this process start `count` more threads. They are started to find out, and none ends
// before `gate` opens, after the last one was started.
inline bool can_start(int count) noexcept {
  std::mutex gate;
  std::unique_lock<std::mutex> closed(gate);
  std::vector<std::thread> started;
  bool all = true;
  try {
    started.reserve(static_cast<std::size_t>(count));
    while (started.size() < static_cast<std::size_t>(count)) {
      started.emplace_back([&gate] { const std::lock_guard<std::mutex> passing(gate); });
    }
  } catch (...) {  // std::system_error or std::bad_alloc
    all = false;
  }
  closed.unlock();
  for (std::thread& thread : started) thread.join();
  return all;
}

// Returns the team that OpenMP may be asked for: `team`, or 1 if the system refuses to start so many threads, where
// libgomp would end the process. libgomp keeps the last team of each calling thread, ends the threads that a smaller
// team does not need, and starts new ones for a larger team. Only a larger team needs the test, which takes as long as
// its start.
inline int granted(int team) noexcept {
  static thread_local int last = 1;
  if (team > last && !can_start(team - last)) return 1;
  return last = team;
}
#endif

}  // namespace threads

inline int num_threads() {
#if defined(_OPENMP)
  if (threads::in_child.load()) return 1;
  const int wanted = threads::wanted.load();
  return wanted > 0 ? wanted : std::clamp(omp_get_max_threads(), 1, threads::kMost);
#else
  return 1;
#endif
}

inline void set_num_threads(int n) { threads::wanted.store(n); }

// Calls body(begin, end) on adjoining ranges that cover [0, n), one a thread; on one range where the work, which
// moves about `bytes`, does not pay for waking threads. Body must not throw. Use for_chunks where the results depend on
// how the range is cut.
template <class Body>
void parallel_for(std::size_t n, double bytes, const Body& body) noexcept {
  if (n == 0) return;
  const double useful = std::min(bytes / threads::kBytesPerThread, static_cast<double>(n));
  int team = useful < 2 ? 1 : static_cast<int>(std::min(useful, static_cast<double>(num_threads())));
#if defined(_OPENMP)
  if (team > 1) team = threads::granted(team);
#endif
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

// parallel_for on ranges of [0, n) that begin at multiples of `chunk`.
template <class Body>
void parallel_chunks(std::size_t n, std::size_t chunk, double bytes, const Body& body) noexcept {
  parallel_for(ceil_div(n, chunk), bytes,
               [&](std::size_t begin, std::size_t end) { body(begin * chunk, std::min(end * chunk, n)); });
}

// Calls body(i, begin, end) for every chunk of [0, n), the last of which may be shorter. The chunks are the same for
// any number of threads, and so are results that are combined in their order.
template <class Body>
void for_chunks(std::size_t n, std::size_t chunk, double bytes, const Body& body) noexcept {
  parallel_for(ceil_div(n, chunk), bytes, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) body(i, i * chunk, std::min((i + 1) * chunk, n));
  });
}

}  // namespace fastopt
