// The thread pool: threads pinned to physical cores, tasks taken from atomic counters, a bounded spin and then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace ktfx {

constexpr int kMaxShares = 16;

// Share s of n things is [share_begin(n, s), share_begin(n, s + 1)).
inline int64_t share_begin(int64_t n, int share, int shares) { return n * share / shares; }

// Runs task `task` of share `share` on worker `worker` (0 is the thread that called).
using TaskFn = void (*)(void* context, int share, int64_t task, int worker);

class Pool {
 public:
  Pool(int threads, int shares);
  ~Pool();
  int threads() const { return threads_; }
  int shares() const { return shares_; }

  // Runs every task of every share and returns when all are done. A worker takes its own share's tasks first, then
  // helps the others. A worker that never woke is not waited for. One caller at a time: hold `busy`.
  void run(const int64_t* tasks, TaskFn fn, void* context);
  std::mutex busy;

  std::shared_ptr<void> workspace;  // the running call's; kept for the next one

  // When each worker took its first task of a run and finished its last; 0: it took none. For measurements.
  struct Times {
    std::vector<double> begin, end;
  };
  void note_times(Times* times) { times_.store(times, std::memory_order_relaxed); }  // null: no more

  void begin_call();  // wakes the workers, and keeps them and the caller on different cores

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
    int64_t count = 0;
  };
  void work(int worker);
  int64_t take_tasks(int worker);  // how many it took
  void loop(int worker);
  bool wait_while(std::atomic<uint32_t>& word, uint32_t value);
  void pin(int worker, int core);

  int threads_, shares_;
  std::atomic<Times*> times_{nullptr};
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  Counter counters_[kMaxShares];
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> inside_;  // workers at work, and kClosed
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
  std::vector<int> core_of_worker_;  // an index into the machine's cores
  int spare_core_ = 0;
};

struct Machine {
  std::vector<int> cores;        // one allowed logical CPU a physical core, nodes in order
  std::vector<int> core_of_cpu;  // logical CPU to index in cores, -1: not ours
  int nodes = 1;
  int quota = 0;  // CPUs that the control group allows, 0: no limit
};
const Machine& machine();

std::shared_ptr<Pool> pool();  // the process's pool, made on first use and made anew after a fork
void resize_pool(int threads, int shares);

}  // namespace ktfx
