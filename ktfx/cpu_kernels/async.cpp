// Calls that return before they are done: tickets, the host function of a CUDA graph, and the thread that watches flags.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <unordered_map>
#include <vector>

#include <pthread.h>

#include "dispatch.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ktfx {
namespace {

// One thread that runs submitted calls in order.
class Queue {
 public:
  Queue() : thread_([this] { loop(); }) { thread_.detach(); }

  int64_t submit(const ktfx_call& call) {
    std::lock_guard<std::mutex> hold(lock_);
    const int64_t ticket = ++last_;
    calls_.emplace(ticket, Entry{call, false});
    waiting_.push_back(ticket);
    wake_.notify_one();
    return ticket;
  }

  int32_t wait(int64_t ticket, char* message) {
    std::unique_lock<std::mutex> hold(lock_);
    auto it = calls_.find(ticket);
    if (it == calls_.end()) {
      if (message) snprintf(message, KTFX_MESSAGE, "ticket %lld is unknown, or was waited for before", (long long)ticket);
      return KTFX_BAD_ARGUMENT;
    }
    done_.wait(hold, [&] {
      it = calls_.find(ticket);
      return it == calls_.end() || it->second.done;
    });
    if (it == calls_.end()) {
      if (message) snprintf(message, KTFX_MESSAGE, "ticket %lld was waited for twice", (long long)ticket);
      return KTFX_BAD_ARGUMENT;
    }
    const int32_t status = it->second.call.status;
    if (message) memcpy(message, it->second.call.message, KTFX_MESSAGE);
    calls_.erase(it);
    return status;
  }

 private:
  struct Entry {
    ktfx_call call;
    bool done;
  };
  void loop() {
    std::unique_lock<std::mutex> hold(lock_);
    for (;;) {
      wake_.wait(hold, [&] { return !waiting_.empty(); });
      const int64_t ticket = waiting_.front();
      waiting_.pop_front();
      ktfx_call* call = &calls_.find(ticket)->second.call;  // a map's elements stay where they are
      hold.unlock();
      ktfx_experts(call);
      hold.lock();
      calls_.find(ticket)->second.done = true;
      done_.notify_all();
    }
  }

  std::mutex lock_;
  std::condition_variable wake_, done_;
  std::unordered_map<int64_t, Entry> calls_;
  std::deque<int64_t> waiting_;
  int64_t last_ = 0;
  std::thread thread_;
};

std::mutex* queue_lock = new std::mutex;
Queue* the_queue = nullptr;

void after_fork() {  // the queue's thread did not come along; tickets of the parent are the parent's
  queue_lock = new std::mutex;
  the_queue = nullptr;
}

Queue* queue() {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
  (void)registered;
  std::lock_guard<std::mutex> hold(*queue_lock);
  if (!the_queue) the_queue = new Queue;
  return the_queue;
}

}  // namespace
}  // namespace ktfx

struct ktfx_poller {
  struct Entry {
    ktfx_call* call;
    volatile uint32_t *start, *done;
  };
  std::mutex lock;
  std::condition_variable wake;
  std::vector<Entry> entries;
  std::atomic<bool> armed{false}, stop{false};
  std::thread thread;

  static void finish(const Entry& e, uint32_t value) {
    __atomic_store_n(e.done, value, __ATOMIC_SEQ_CST);  // the output before the flag
  }

  // True if a flag was up.
  bool look() {
    bool found = false;
    for (const Entry& e : entries) {
      if (__atomic_load_n(e.start, __ATOMIC_ACQUIRE) != 1) continue;
      found = true;
      __atomic_store_n(e.start, 0u, __ATOMIC_RELAXED);
      int32_t status = KTFX_SHUT_DOWN;
      if (stop) snprintf(e.call->message, KTFX_MESSAGE, "the poller was shut down before the call ran");
      else status = ktfx_experts(e.call);
      e.call->status = status;
      finish(e, status == KTFX_OK ? 1 : 2);
    }
    return found;
  }

  void loop() {
    std::unique_lock<std::mutex> hold(lock);
    int idle = 0;
    while (!stop) {
      if (!armed) {
        // Asleep, but a flag that was raised all the same must not hang its stream.
        if (!look()) wake.wait_for(hold, std::chrono::milliseconds(2));
        continue;
      }
      if (look()) idle = 0;
      else if (++idle % 256 == 0) {
        hold.unlock();  // let add and destroy in
        std::this_thread::yield();
        hold.lock();
      } else {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    }
    look();
  }
};

extern "C" {

int64_t ktfx_submit(const ktfx_call* call) {
  try {
    return call ? ktfx::queue()->submit(*call) : -KTFX_BAD_ARGUMENT;
  } catch (const std::exception&) {
    return -KTFX_NO_MEMORY;
  }
}

int32_t ktfx_wait(int64_t ticket, char* message) { return ktfx::queue()->wait(ticket, message); }

void ktfx_host_call(void* call) { ktfx_experts((ktfx_call*)call); }

ktfx_poller* ktfx_poller_create(void) {
  try {
    auto p = std::make_unique<ktfx_poller>();
    ktfx_poller* raw = p.get();
    p->thread = std::thread([raw] { raw->loop(); });
    return p.release();
  } catch (const std::exception&) {
    return nullptr;
  }
}

int32_t ktfx_poller_add(ktfx_poller* p, ktfx_call* call, volatile uint32_t* start, volatile uint32_t* done) {
  if (!p || !call || !start || !done) return KTFX_BAD_ARGUMENT;
  try {
    std::lock_guard<std::mutex> hold(p->lock);
    p->entries.push_back({call, start, done});
  } catch (const std::exception&) {
    return KTFX_NO_MEMORY;
  }
  return KTFX_OK;
}

void ktfx_poller_arm(ktfx_poller* p, int32_t on) {
  p->armed = on != 0;
  p->wake.notify_one();
}

void ktfx_poller_destroy(ktfx_poller* p) {
  if (!p) return;
  p->stop = true;
  p->wake.notify_one();
  p->thread.join();
  delete p;
}

}  // extern "C"
