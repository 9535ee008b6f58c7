// The limits of this machine, measured on the same threads as the kernels.
#include <algorithm>
#include <chrono>

#include "dispatch.h"
#include "pool.h"

namespace {

struct Measuring {
  const uint8_t* data;
  int64_t bytes, piece;
  bool fetch;
  volatile double sink[1024];
};

double seconds_of(ktfx::Pool& p, int64_t n, ktfx::TaskFn fn, void* context) {
  int64_t tasks[ktfx::kMaxShares] = {n};
  const auto begin = std::chrono::steady_clock::now();
  p.run(tasks, fn, context);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

extern "C" {

double ktfx_measure_read(const void* data, int64_t bytes, int32_t fetch) {
  auto p = ktfx::pool();
  std::lock_guard<std::mutex> hold(p->busy);
  p->begin_call();
  static Measuring m;
  m.data = (const uint8_t*)data;
  m.bytes = bytes;
  m.piece = 512 << 10;
  m.fetch = fetch != 0;
  const double s = seconds_of(
      *p, (bytes + m.piece - 1) / m.piece,
      [](void* c, int, int64_t task, int worker) {
        Measuring& q = *(Measuring*)c;
        const int64_t at = task * q.piece;
        q.sink[worker % 1024] = ktfx::kernels().sum(q.data + at, std::min(q.piece, q.bytes - at), q.fetch);
      },
      &m);
  return (double)bytes / s;
}

double ktfx_measure_fma(void) {
  auto p = ktfx::pool();
  std::lock_guard<std::mutex> hold(p->busy);
  p->begin_call();
  constexpr int64_t rounds = 20000;
  const int64_t n = p->threads() * 64;
  static double flops;
  flops = 0;
  const double s = seconds_of(
      *p, n,
      [](void* c, int, int64_t task, int) {
        const double f = ktfx::kernels().fma(rounds);
        if (task == 0) *(double*)c = f;
      },
      &flops);
  return flops * (double)n / s;
}

}  // extern "C"
