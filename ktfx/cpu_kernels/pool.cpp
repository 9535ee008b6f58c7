#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <set>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ktfx {
namespace {

constexpr uint32_t kClosed = 0x80000000u;
constexpr int kSpinsAfterWake = 4;  // who was woken, has a call coming: it may still be prepared in Python
constexpr int kWakes = 4;  // sleepers that one thread wakes: with so many, two rounds wake sixteen

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<uint32_t>& word, int most = INT_MAX) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0);
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Subnormal weights must keep their value whatever the caller's thread has set; put back on the way out.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FloatMode() {}
  ~FloatMode() {}
#endif
};

int number_in(const char* path) {
  std::ifstream in(path);
  int value = -1;
  in >> value;
  return in ? value : -1;
}

std::vector<int> parse_cpus(const std::string& text) {
  std::vector<int> cpus;
  const char* p = text.c_str();
  while (*p >= '0' && *p <= '9') {
    char* end;
    long a = strtol(p, &end, 10), b = a;
    if (*end == '-') b = strtol(end + 1, &end, 10);
    for (long c = a; c <= b && c < 4096; ++c) cpus.push_back((int)c);
    p = *end == ',' ? end + 1 : "";
  }
  return cpus;
}

Machine find_machine() {
  Machine m;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) CPU_SET(0, &allowed);
  m.core_of_cpu.assign(CPU_SETSIZE, -1);
  std::vector<std::vector<int>> nodes;
  for (int n = 0; n < 64; ++n) {
    std::ifstream in("/sys/devices/system/node/node" + std::to_string(n) + "/cpulist");
    std::string text;
    if (in && std::getline(in, text)) nodes.push_back(parse_cpus(text));
  }
  if (nodes.empty()) {
    nodes.emplace_back();
    for (int c = 0; c < CPU_SETSIZE; ++c) nodes[0].push_back(c);
  }
  m.nodes = 0;
  for (const auto& node : nodes) {
    bool used = false;
    for (int cpu : node) {
      if (cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &allowed) || m.core_of_cpu[cpu] >= 0) continue;
      used = true;
      std::ifstream in("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
      std::string text;
      std::vector<int> siblings;
      if (in && std::getline(in, text)) siblings = parse_cpus(text);
      for (int s : siblings)
        if (s < CPU_SETSIZE) m.core_of_cpu[s] = (int)m.cores.size();
      m.core_of_cpu[cpu] = (int)m.cores.size();
      m.cores.push_back(cpu);
    }
    m.nodes += used;
  }
  if (m.cores.empty()) m.cores.push_back(0);
  m.nodes = std::max(m.nodes, 1);
  long quota = -1, period = 100000;
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  if (v2) v2 >> quota >> period;  // "max" leaves quota 0
  else {
    quota = number_in("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    period = number_in("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  }
  if (quota > 0 && period > 0) m.quota = std::max(1, (int)((quota + period - 1) / period));
  return m;
}

int from_environment(const char* name, int otherwise) {
  const char* text = getenv(name);
  if (!text || !*text) return otherwise;
  char* end;
  long value = strtol(text, &end, 10);
  return *end || value < 0 ? otherwise : (int)value;
}

std::chrono::nanoseconds spin_time() {
  static const int us = from_environment("KTFX_CPU_SPIN_US", 50);
  return std::chrono::microseconds(us);
}

std::shared_ptr<Pool>* the_pool = new std::shared_ptr<Pool>;
std::mutex* pool_lock = new std::mutex;

// In a forked child the parent's workers do not exist and its locks may be held: start afresh, and leak the old ones.
void after_fork() {
  the_pool = new std::shared_ptr<Pool>;
  pool_lock = new std::mutex;
}

Pool* make_pool(int threads, int shares) {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
  (void)registered;
  const Machine& m = machine();
  int n = threads > 0 ? threads : from_environment("KTFX_CPU_THREADS", 0);
  if (n <= 0) {
    n = (int)m.cores.size();
    if (m.quota) n = std::min(n, m.quota);
  }
  int s = shares > 0 ? shares : from_environment("KTFX_CPU_SHARES", 0);
  if (s <= 0) s = m.nodes;
  return new Pool(std::min(n, 1024), std::max(1, std::min({s, n, kMaxShares})));
}

}  // namespace

const Machine& machine() {
  static const Machine m = find_machine();
  return m;
}

std::shared_ptr<Pool> pool() {
  std::lock_guard<std::mutex> hold(*pool_lock);
  if (!*the_pool) the_pool->reset(make_pool(0, 0));
  return *the_pool;
}

void resize_pool(int threads, int shares) {
  std::shared_ptr<Pool> old;  // ends after the lock, when its last call has returned
  std::lock_guard<std::mutex> hold(*pool_lock);
  old = std::move(*the_pool);
  the_pool->reset(make_pool(threads, shares));
}

Pool::Pool(int threads, int shares)
    : threads_(threads), shares_(shares), ranges_(threads), reading_(threads), inside_(kClosed) {
  const int cores = (int)machine().cores.size();
  core_of_worker_.resize(threads_);
  for (int w = 0; w < threads_; ++w) core_of_worker_[w] = w < cores ? w : -1;
  for (int w = 1; w < threads_; ++w) workers_.emplace_back([this, w] { loop(w); });
}

Pool::~Pool() {
  stop_ = true;
  generation_.fetch_add(1);
  futex_wake(generation_);
  for (auto& w : workers_) w.join();
}

void Pool::pin(int worker, int core) {
  static const bool wanted = from_environment("KTFX_CPU_PIN", 1) != 0;
  if (!wanted || core < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(machine().cores[core], &set);
  pthread_setaffinity_np(workers_[worker - 1].native_handle(), sizeof set, &set);
}

void Pool::wake() {
  // Whoever wakes finds nothing open yet, and spins until there is.
  if (!sleepers_.load(std::memory_order_relaxed)) return;
  generation_.fetch_add(1);
  futex_wake(generation_, kWakes);
}

void Pool::begin_call() {
  wake();  // takes as long as a small call's own preparation: let them overlap
  // The caller is worker 0 and is not ours to pin; if it has moved onto a worker's core, that worker takes the core
  // left free. Costs a system call only when the caller has moved.
  if (threads_ == 1 || threads_ > (int)machine().cores.size()) return;
  if (core_of_worker_[0] == 0 && spare_core_ == 0) {  // first call
    for (int w = 1; w < threads_; ++w) pin(w, core_of_worker_[w]);
    core_of_worker_[0] = -1;
  }
  const int cpu = sched_getcpu();
  const int core = cpu >= 0 && cpu < (int)machine().core_of_cpu.size() ? machine().core_of_cpu[cpu] : -1;
  for (int w = 1; w < threads_ && core >= 0; ++w)
    if (core_of_worker_[w] == core) {
      core_of_worker_[w] = spare_core_;
      spare_core_ = core;
      pin(w, core_of_worker_[w]);
      return;
    }
}

// True when the word has changed; false after so many spin times.
bool Pool::wait_while(std::atomic<uint32_t>& word, uint32_t value, Reading* reading, int spins) {
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != value) return true;
      if (!reading->fetch_line()) relax();
    }
    if (std::chrono::steady_clock::now() - begin > spins * spin_time()) return false;
  }
}

void Pool::loop(int worker) {
  FloatMode mode;
  Reading reading;  // a copy: the caller writes the next one while this thread still fetches
  uint32_t seen = 0;
  int spins = 1;
  for (;;) {
    const bool slept = !wait_while(generation_, seen, &reading, spins);
    spins = slept ? kSpinsAfterWake : 1;
    if (slept) {
      sleepers_.fetch_add(1);
      while (generation_.load() == seen) futex_wait(generation_, seen);
      // Each wakes some more, so that no thread spends its time on waking all the others. Nobody is missed: whoever
      // still sleeps was asleep before the generation changed, and is in the queue.
      if (sleepers_.fetch_sub(1) > 1) futex_wake(generation_, kWakes);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    reading.clear();
    if (!(inside_.fetch_add(1, std::memory_order_acq_rel) & kClosed)) {
      work(worker);
      if (any_reading_) reading = reading_[worker];
    }
    if (inside_.fetch_sub(1, std::memory_order_acq_rel) == kClosed + 1) futex_wake(inside_);
  }
}

void Pool::work(int worker) {
  Times* times = times_.load(std::memory_order_relaxed);
  const double begin = times ? seconds_now() : 0;
  const int64_t done = take_tasks(worker);
  if (times && done) {
    times->begin[worker] = begin;
    times->end[worker] = seconds_now();
  }
}

namespace {

int64_t take_first(std::atomic<uint64_t>& left) {
  uint64_t v = left.load(std::memory_order_relaxed);
  while ((uint32_t)v < v >> 32)
    if (left.compare_exchange_weak(v, v + 1, std::memory_order_relaxed)) return (uint32_t)v;
  return -1;
}
int64_t take_last(std::atomic<uint64_t>& left) {
  uint64_t v = left.load(std::memory_order_relaxed);
  while ((uint32_t)v < v >> 32)
    if (left.compare_exchange_weak(v, v - (1ull << 32), std::memory_order_relaxed)) return (int64_t)(v >> 32) - 1;
  return -1;
}

}  // namespace

uint64_t Pool::range_of(int worker, const int64_t* tasks) const {
  const int share = own_share(worker), first = first_worker(share), workers = first_worker(share + 1) - first;
  const uint64_t begin = (uint64_t)share_begin(tasks[share], worker - first, workers);
  return begin | (uint64_t)share_begin(tasks[share], worker - first + 1, workers) << 32;
}

bool Pool::first_task(int worker, const int64_t* tasks, int* share, int64_t* task) const {
  const uint64_t range = range_of(worker, tasks);
  *share = own_share(worker);
  *task = (uint32_t)range;
  return (uint32_t)range < range >> 32;
}

// Tasks that workers of a share have left, beginning with worker `from`.
int64_t Pool::help(int share, int from, int worker) {
  const int first = first_worker(share), workers = first_worker(share + 1) - first;
  int64_t done = 0;
  for (int i = 0; i < workers; ++i) {
    std::atomic<uint64_t>& left = ranges_[first + (from - first + i) % workers].left;
    for (int64_t task; (task = take_last(left)) >= 0; ++done) fn_(context_, share, task, worker);
  }
  return done;
}

int64_t Pool::take_tasks(int worker) {
  int64_t done = 0;
  const int own = own_share(worker);
  for (int64_t task; (task = take_first(ranges_[worker].left)) >= 0; ++done) fn_(context_, own, task, worker);
  done += help(own, worker, worker);
  for (int i = 1; i < shares_; ++i) {
    const int share = (own + i) % shares_;
    done += help(share, first_worker(share), worker);
  }
  return done;
}

void Pool::run(const int64_t* tasks, TaskFn fn, void* context) {
  FloatMode mode;
  int64_t total = 0;
  for (int s = 0; s < shares_; ++s) total += tasks[s];
  for (int w = 0; w < threads_; ++w) ranges_[w].left.store(range_of(w, tasks), std::memory_order_relaxed);
  fn_ = fn;
  context_ = context;
  if (total <= 1 || threads_ == 1) {
    work(0);
  } else {
    inside_.fetch_and(~kClosed, std::memory_order_acq_rel);
    generation_.fetch_add(1);
    if (sleepers_.load()) futex_wake(generation_, kWakes);
    work(0);
    // All tasks are taken; wait for the workers that took some.
    uint32_t value = inside_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed;
    while (value != kClosed) {
      if (!wait_while(inside_, value, &reading_[0], 1) && inside_.load() == value) futex_wait(inside_, value);
      value = inside_.load(std::memory_order_acquire);
    }
  }
  if (any_reading_)
    for (Reading& r : reading_) r.clear();
  any_reading_ = false;
}

}  // namespace ktfx
