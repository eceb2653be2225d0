// Threads: no other file knows how the work is spread.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastopt {

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

inline std::size_t num_threads();

#if defined(FASTOPT_NO_THREADS)
inline constexpr bool kThreads = false;
#else
inline constexpr bool kThreads = true;
#endif

namespace threads {

inline constexpr std::size_t kMost = 4096;  // of set_num_threads() and OMP_NUM_THREADS
inline std::atomic<std::size_t> wanted{0};  // 0: not set, the default

// Waking a thread costs up to some 30 us; in that time a core moves about this many bytes.
inline constexpr double kBytesPerThread = 1024 * 1024;
inline constexpr double kBytesPerPiece = 128 * 1024;
inline constexpr std::size_t kPieces = 8;       // of a share, at most
inline constexpr int kSpins = 1000;             // some 10 us
inline constexpr std::size_t kStack = 1 << 19;  // of a helper; the default of 8 MB can exhaust a limit on memory

inline void pause() noexcept {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns true once `done` does, or false after some 10 us.
template <class Done>
bool spin_until(const Done& done) noexcept {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
    pause();
  }
  return done();
}

// The cores that this process may run on, or OMP_NUM_THREADS, which NumPy's BLAS honours too.
inline std::size_t default_count() noexcept {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const long count = std::strtol(text, nullptr, 10);
    if (count > 0) return std::min(static_cast<std::size_t>(count), kMost);
  }
  std::size_t cores = std::thread::hardware_concurrency();
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = static_cast<std::size_t>(CPU_COUNT(&set));
#endif
  return std::clamp<std::size_t>(cores, 1, kMost);
}

// Functions of an OpenMP runtime whose threads do the work instead of the pool's own: the idle ones of torch would
// otherwise spin on the cores that the pool needs. Null: the pool's own threads.
struct OpenMP {
  std::atomic<void (*)(void (*)(void*), void*, unsigned, unsigned)> parallel{nullptr};  // GOMP_parallel
  std::atomic<int (*)()> max_threads{nullptr}, thread_num{nullptr};                     // omp_get_...
};
inline OpenMP openmp;

// Threads that help the one which calls run(). They sleep between jobs.
//
//   share of the caller           share of helper 1             share of helper 2
//   |----|----|----|----|         |----|----|----|----|         |----|----|----|----|     pieces
//
// Each thread takes the pieces of its own share, so that those of repeated jobs stay in its cache, and then what is
// left of the others. Nobody waits for a helper that does not run yet, only for the pieces that it has taken: a thread
// may wait for a core for milliseconds, where other processes compute or the idle threads of BLAS spin.
class Pool {
 public:
  // Calls piece(body, begin, end) on adjoining ranges that cover [0, n), spread over at most `team` threads; on one
  // range if the pool is at work for another thread, or no helper can be started.
  using Piece = void (*)(const void* body, std::size_t begin, std::size_t end);
  void run(std::size_t n, std::size_t pieces, std::size_t team, Piece piece, const void* body) noexcept {
    if (busy_.exchange(true, std::memory_order_acquire)) return piece(body, 0, n);
    const auto parallel = openmp.parallel.load(std::memory_order_acquire);
    team = parallel ? std::min(team, reserve(team)) : 1 + start(team - 1);
    if (team == 1) {
      piece(body, 0, n);
    } else {
      piece_ = piece;
      body_ = body;
      cut(n, pieces, team);
      if (parallel) {
        share(parallel, num_threads());
        busy_.store(false, std::memory_order_release);
        return;
      }
      state_.store(next_job(state_.load(std::memory_order_relaxed)), std::memory_order_release);
      wake(team - 1);
      take(0);
      finish();
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  struct alignas(64) Share {
    std::atomic<std::size_t> next;
    std::size_t end;
  };

  // The state of the pool: the number of the job, a bit that says whether helpers may still join it, and how many have.
  static constexpr std::uint64_t kHelpers = 0x3fff, kOpen = 0x4000, kJob = 0x8000;
  static std::uint64_t next_job(std::uint64_t state) { return (state / kJob + 1) * kJob | kOpen; }

  // Makes room for the shares of a team. Returns its size, or 1 if there is no memory for it.
  std::size_t reserve(std::size_t team) noexcept {
    if (team > capacity_) {
      Share* const shares = new (std::nothrow) Share[team];
      if (shares == nullptr) return 1;
      shares_.reset(shares);
      capacity_ = team;
    }
    return team;
  }

  // Starts helpers until there are `count`, or as many as the system allows. Returns the smaller number.
  std::size_t start(std::size_t count) noexcept {
    if (reserve(count + 1) == 1) return 0;
    if (helpers_ < count) {
      pthread_attr_t options;
      pthread_attr_init(&options);
      pthread_attr_setstacksize(&options, kStack);
      pthread_attr_setdetachstate(&options, PTHREAD_CREATE_DETACHED);
      const auto help = [](void* pool) -> void* { static_cast<Pool*>(pool)->help(); };
      for (pthread_t thread; helpers_ < count && pthread_create(&thread, &options, help, this) == 0;) ++helpers_;
      pthread_attr_destroy(&options);
    }
    return std::min(count, helpers_);
  }

  // Ranges begin at multiples of 8 where a piece has so many: kernels handle some rows side by side.
  void cut(std::size_t n, std::size_t pieces, std::size_t team) noexcept {
    length_ = ceil_div(n, pieces);
    if (length_ > 8) length_ = ceil_div(length_, 8) * 8;
    n_ = n;
    team_.store(team, std::memory_order_relaxed);
    const std::size_t count = ceil_div(n, length_);
    for (std::size_t i = 0; i < team; ++i) {
      shares_[i].next.store(count * i / team, std::memory_order_relaxed);
      shares_[i].end = count * (i + 1) / team;
    }
  }

  // The threads of OpenMP take the pieces: always as many threads, since it ends those that a smaller team leaves over.
  // In the middle of another parallel region the caller is alone, and takes all pieces.
  template <class Parallel>
  void share(Parallel parallel, std::size_t count) noexcept {
    const auto take_pieces = [](void* pool) {
      static_cast<Pool*>(pool)->take(static_cast<std::size_t>(openmp.thread_num.load(std::memory_order_relaxed)()));
    };
    parallel(take_pieces, this, static_cast<unsigned>(count), 0);
  }

  void take(std::size_t me) noexcept {
    const std::size_t team = team_.load(std::memory_order_relaxed);
    for (std::size_t i = 0; i < team; ++i) {
      Share& share = shares_[(me + i) % team];
      for (;;) {
        const std::size_t at = share.next.fetch_add(1, std::memory_order_relaxed);
        if (at >= share.end) break;
        piece_(body_, at * length_, std::min((at + 1) * length_, n_));
      }
    }
  }

  void wake(std::size_t count) noexcept {
    std::size_t sleeping;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      sleeping = sleeping_;
    }
    for (std::size_t i = 0; i < std::min(count, sleeping); ++i) begun_.notify_one();
  }

  // Closes the job, and waits for the helpers that are still at work.
  void finish() noexcept {
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto done = [&] { return (state_.load(std::memory_order_acquire) & kHelpers) == 0; };
    if (spin_until(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ended_.wait(lock, done);
  }

  [[noreturn]] void help() noexcept {
    std::uint64_t seen = 0;
    for (;;) {
      const auto begun = [&] { return state_.load(std::memory_order_relaxed) / kJob != seen; };
      if (!spin_until(begun)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        begun_.wait(lock, begun);
        --sleeping_;
      }
      std::uint64_t state = state_.load(std::memory_order_relaxed);
      seen = state / kJob;
      while ((state & kOpen) != 0 && state / kJob == seen &&
             (state & kHelpers) + 1 < team_.load(std::memory_order_relaxed)) {
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire, std::memory_order_relaxed))
          continue;
        take((state & kHelpers) + 1);
        leave();
        break;
      }
    }
  }

  void leave() noexcept {
    const std::uint64_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & (kOpen | kHelpers)) != 1) return;
    const std::lock_guard<std::mutex> lock(mutex_);  // the caller is asleep, or has not yet looked
    ended_.notify_one();
  }

  std::atomic<bool> busy_{false};
  alignas(64) std::atomic<std::uint64_t> state_{0};
  // The job is described before it opens, when no helper is at work.
  alignas(64) std::atomic<std::size_t> team_{0};
  Piece piece_ = nullptr;
  const void* body_ = nullptr;
  std::size_t n_ = 0, length_ = 0;
  std::unique_ptr<Share[]> shares_;
  std::size_t capacity_ = 0, helpers_ = 0;

  std::mutex mutex_;
  std::condition_variable begun_, ended_;
  std::size_t sleeping_ = 0;
};

// The pool is never destroyed: its threads sleep in it when the process ends.
inline std::atomic<Pool*> pool{nullptr};

inline Pool* the_pool() noexcept {
  Pool* present = pool.load(std::memory_order_acquire);
  if (present != nullptr) return present;
  auto* made = new (std::nothrow) Pool;
  if (made != nullptr && !pool.compare_exchange_strong(present, made)) {
    delete made;
    return present;
  }
  return made;
}

// A forked child has only the thread that called fork(), and starts helpers of its own. OpenMP's threads are gone too,
// and it would wait for them.
inline void watch_fork() {
  pthread_atfork(nullptr, nullptr, [] {
    pool.store(nullptr);
    openmp.parallel.store(nullptr);
  });
}

// Takes the threads of an OpenMP runtime, by the addresses of its functions; or those of the pool again, if they are 0.
inline void use_openmp(std::uintptr_t parallel, std::uintptr_t max_threads, std::uintptr_t thread_num) {
  const auto set = [](auto& to, std::uintptr_t address) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    to.store(reinterpret_cast<decltype(to.load())>(address), std::memory_order_release);
  };
  if (parallel != 0) {
    set(openmp.max_threads, max_threads);
    set(openmp.thread_num, thread_num);
  }
  set(openmp.parallel, parallel);
}

}  // namespace threads

inline std::size_t num_threads() {
  if (!kThreads) return 1;
  static const std::size_t count = threads::default_count();
  const std::size_t wanted = threads::wanted.load(std::memory_order_relaxed);
  if (wanted > 0) return wanted;
  if (threads::openmp.parallel.load(std::memory_order_acquire) == nullptr) return count;
  return static_cast<std::size_t>(std::max(threads::openmp.max_threads.load(std::memory_order_relaxed)(), 1));
}

inline void set_num_threads(std::size_t n) { threads::wanted.store(n); }

// Calls body(begin, end) on adjoining ranges that cover [0, n), spread over threads; on one range where the work, which
// moves about `bytes`, does not pay for waking them. Body must not throw. Use for_chunks where the results depend on
// how the range is cut.
template <class Body>
void parallel_for(std::size_t n, double bytes, const Body& body) noexcept {
  if (n == 0) return;
  const auto at_most = [&](double useful) {
    return static_cast<std::size_t>(std::min(useful, static_cast<double>(n)));
  };
  const std::size_t team = std::min(num_threads(), at_most(bytes / threads::kBytesPerThread));
  threads::Pool* const pool = team > 1 ? threads::the_pool() : nullptr;
  if (pool == nullptr) {
    body(std::size_t{0}, n);
    return;
  }
  const std::size_t pieces = std::clamp(at_most(bytes / threads::kBytesPerPiece), team, team * threads::kPieces);
  pool->run(
      n, pieces, team,
      [](const void* f, std::size_t begin, std::size_t end) { (*static_cast<const Body*>(f))(begin, end); }, &body);
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
