// The thread pool: threads pinned to physical cores, a range of tasks for each and stealing, a bounded spin and then sleep.
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

// Memory that a worker will read first in the next run, fetched while it waits for the others to finish this one.
class Reading {
 public:
  static constexpr int64_t kMost = 128 << 10;  // bytes, within every processor's second cache
  void clear() { count_ = at_ = 0, left_ = kMost; }
  bool full() const { return count_ == kPieces || left_ <= 0; }
  void add(const uint8_t* from, int64_t bytes) {
    if (full()) return;
    pieces_[count_++] = {from, from + (bytes < left_ ? bytes : left_)};
    left_ -= bytes;
  }
  bool fetch_line() {  // false: all is fetched
    if (at_ == count_) return false;
    Piece& p = pieces_[at_];
    __builtin_prefetch(p.from, 0, 2);
    p.from += 64;
    if (p.from >= p.to) ++at_;
    return true;
  }

 private:
  static constexpr int kPieces = 8;
  struct Piece {
    const uint8_t *from, *to;
  };
  Piece pieces_[kPieces];
  int count_ = 0, at_ = 0;
  int64_t left_ = kMost;
};

class Pool {
 public:
  Pool(int threads, int shares);
  ~Pool();
  int threads() const { return threads_; }
  int shares() const { return shares_; }

  // Runs every task of every share and returns when all are done. Each worker of a share has a range of its tasks, which it
  // takes in order, so that it knows what comes next; then it takes the last ones of others, of its own share first. A
  // worker that never woke is not waited for. One caller at a time: hold `busy`.
  void run(const int64_t* tasks, TaskFn fn, void* context);
  // The share of a worker, and the first task of its range in a run of so many tasks; false: it has none of its own.
  bool first_task(int worker, const int64_t* tasks, int* share, int64_t* task) const;
  // For the next run: what a worker shall fetch when it finds no more tasks. Plain addresses: nothing is read.
  Reading& then_reads(int worker) {
    any_reading_ = true;
    return reading_[worker];
  }
  std::mutex busy;

  std::shared_ptr<void> workspace;  // the running call's; kept for the next one

  // When each worker took its first task of a run and finished its last; 0: it took none. For measurements.
  struct Times {
    std::vector<double> begin, end;
  };
  void note_times(Times* times) { times_.store(times, std::memory_order_relaxed); }  // null: no more

  void wake();        // workers that sleep begin to spin: a call will come soon
  void begin_call();  // wakes the workers, and keeps them and the caller on different cores

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};  // first task in the lower half, end in the upper
  };
  int own_share(int worker) const { return (int)((int64_t)worker * shares_ / threads_); }
  int first_worker(int share) const { return (int)(((int64_t)share * threads_ + shares_ - 1) / shares_); }
  uint64_t range_of(int worker, const int64_t* tasks) const;
  int64_t help(int share, int from, int worker);
  void work(int worker);
  int64_t take_tasks(int worker);  // how many it took
  void loop(int worker);
  bool wait_while(std::atomic<uint32_t>& word, uint32_t value, Reading* reading, int spins);
  void pin(int worker, int core);

  int threads_, shares_;
  std::atomic<Times*> times_{nullptr};
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  std::vector<Range> ranges_;  // by worker
  std::vector<Reading> reading_;
  bool any_reading_ = false;
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
