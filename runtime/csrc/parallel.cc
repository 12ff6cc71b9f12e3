#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "kernels.h"

namespace hcmen {
namespace {

// To be woken costs some 50 microseconds, as much as many a scan. So whoever waits looks about for that long first, and
// sleeps then: operators in a row find the workers awake, and an idle pool uses no processor.
constexpr std::chrono::microseconds kLookAbout(50);

// Calls that begin this close behind each other are in a row. Waking a worker for 20 to 50 microseconds of work makes a call that
// stands alone slower (128 channels over 50 steps: 44 microseconds on two threads, 27 on one), and the first of a row
// of many faster ones.
constexpr std::chrono::microseconds kRow(200);

inline void relax() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

template <class Condition>
void look_about(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + kLookAbout;
  do {
    for (int i = 0; i < 8; ++i) {
      if (condition()) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
}

// Lives on the caller's stack. `next` is shared without the lock; all else is changed under the pool's mutex only.
struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t tasks;
  int seats;  // helpers that may still join
  std::atomic<int> helpers{0};
  std::atomic<int64_t> next{0};
  std::condition_variable left;
  Job* following = nullptr;

  Job(void (*body_)(void*, int64_t), void* context_, int64_t tasks_, int seats_)
      : body(body_), context(context_), tasks(tasks_), seats(seats_) {}

  void work() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task);
  }
};

class Pool {
 public:
  void run(Job& job, bool brief) {
    int seats = job.seats;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (brief && sleeping_ == workers_) {
        const auto now = std::chrono::steady_clock::now();
        const bool in_a_row = now - last_brief_ < kRow;
        last_brief_ = now;
        if (!in_a_row) seats = 0;
      }
      while (workers_ < seats && start_worker()) ++workers_;
      if (seats) {
        job.following = jobs_;
        jobs_ = &job;
        announced_.fetch_add(1, std::memory_order_relaxed);
      }
    }
    if (!seats) return job.work();
    for (int i = 0; i < seats; ++i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    // Out of the list first: a helper that comes late finds nothing, and nobody waits for it.
    for (Job** link = &jobs_; *link; link = &(*link)->following) {
      if (*link == &job) {
        *link = job.following;
        break;
      }
    }
    if (job.helpers == 0) return;
    lock.unlock();
    look_about([&] { return job.helpers.load(std::memory_order_relaxed) == 0; });
    // The last helper still holds the lock while it names itself gone, and may then touch the job no more.
    lock.lock();
    job.left.wait(lock, [&] { return job.helpers == 0; });
  }

 private:
  bool start_worker() {
    // Signals are for the threads of the program: Ctrl-C must not land here.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      started = false;
    } catch (const std::bad_alloc&) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    bool rested = false;  // looked about in vain
    for (;;) {
      Job* job = jobs_;
      while (job && job->seats == 0) job = job->following;
      if (!job) {
        const uint64_t seen = announced_.load(std::memory_order_relaxed);
        if (rested) {
          ++sleeping_;
          wake_.wait(lock);
          --sleeping_;
          rested = false;
        } else {
          lock.unlock();
          look_about([&] { return announced_.load(std::memory_order_relaxed) != seen; });
          lock.lock();
          rested = true;
        }
        continue;
      }
      rested = false;
      --job->seats;
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      // The caller can go, and the job with it, only once the lock is released again.
      if (--job->helpers == 0) job->left.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* jobs_ = nullptr;
  int workers_ = 0, sleeping_ = 0;
  std::chrono::steady_clock::time_point last_brief_;  // that found everyone asleep
  std::atomic<uint64_t> announced_{0};
};

// Never destroyed: its workers run until the process ends. (The library is linked so that it is never unloaded.)
std::atomic<Pool*> instance{nullptr};

// The threads of the parent do not exist in a forked child, and its mutex may be held by one of them for ever.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { instance.store(nullptr); });

Pool* pool() {
  Pool* found = instance.load(std::memory_order_acquire);
  if (found) return found;
  Pool* made = new (std::nothrow) Pool;
  if (!made) return nullptr;
  if (instance.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return made;
  delete made;
  return found;
}

constexpr int kMostThreads = 256;

}  // namespace

void parallel_for(int threads, int64_t tasks, void (*body)(void* context, int64_t task), void* context,
                  bool brief) {
  (void)fork_handler;
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads > tasks) threads = (int)tasks;
  Pool* workers = threads > 1 ? pool() : nullptr;
  if (!workers) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
    return;
  }
  Job job(body, context, tasks, threads - 1);
  workers->run(job, brief);
}

Threads own_threads(int count) {
  return {count,
          [](void* threads, int64_t tasks, int (*task)(void*, int64_t), void* context, bool brief) {
            return parallel_tasks((int)(intptr_t)threads, tasks, [&](int64_t i) { return task(context, i); }, brief);
          },
          (void*)(intptr_t)count};
}

}  // namespace hcmen
