// ktfx_linear under the sanitizers: every format, instruction set and dtype over awkward shapes, buffers of exactly the right
// size, several threads at once, bad arguments. Prints "ok" and returns 0 if all held.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../ktfx/cpu_kernels/ktfx_linear.h"

namespace {

#define CHECK(what)                                                            \
  do {                                                                         \
    if (!(what)) {                                                             \
      fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #what); \
      exit(1);                                                                 \
    }                                                                          \
  } while (0)

std::vector<float> randoms(int64_t n, unsigned seed) {
  std::mt19937 g(seed);
  std::normal_distribution<float> d(0.0f, 0.2f);
  std::vector<float> v(n);
  for (auto& f : v) f = d(g);
  return v;
}

uint16_t bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return (uint16_t)(u >> 16);
}
float from_bf16(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

struct Weight {
  ktfx_matrix matrix = {};
  std::unique_ptr<uint8_t, void (*)(void*)> packed{nullptr, free};
  std::vector<float> plain, bias;
};

Weight make_weight(int N, int K, int format) {
  Weight w;
  CHECK(ktfx_matrix_layout(&w.matrix, format, 32, KTFX_F32, N, K, 0) == KTFX_OK);
  const int64_t bytes = w.matrix.tiles * w.matrix.tile_bytes;
  w.packed.reset((uint8_t*)aligned_alloc(64, bytes));
  const std::vector<float> from = randoms((int64_t)N * K, 7);
  std::vector<uint16_t> halves;
  for (float f : from) halves.push_back(format == KTFX_FMT_F16 ? (uint16_t)(0x3000 | (bf16(f) & 0x83ff)) : bf16(f));
  const bool half = format == KTFX_FMT_BF16 || format == KTFX_FMT_F16;
  ktfx_source s = {};
  s.data = half ? (const void*)halves.data() : from.data();
  s.dtype = format == KTFX_FMT_BF16 ? KTFX_BF16 : format == KTFX_FMT_F16 ? KTFX_F16 : KTFX_F32;
  s.row_stride = K;
  s.column_stride = 1;
  char message[KTFX_MESSAGE];
  ktfx_place(w.packed.get(), &w.matrix, 1, 1);
  CHECK(ktfx_pack(&w.matrix, &s, 1, w.packed.get(), message) == KTFX_OK);
  w.plain.resize((int64_t)N * K);
  CHECK(ktfx_unpack(&w.matrix, w.packed.get(), w.plain.data()) == KTFX_OK);
  w.bias = randoms(N, 5);
  return w;
}

// ‖out − reference‖ / ‖reference‖ of one call on heap buffers without slack.
double run(const Weight& w, int64_t rows, bool half, bool int8) {
  const int64_t N = w.matrix.N, K = w.matrix.K;
  const std::vector<float> x = randoms(rows * K, 1);
  std::vector<uint16_t> x16, out16(half ? rows * N : 0, 0x7fc0);
  std::vector<float> out(half ? 0 : rows * N, NAN);
  if (half)
    for (float f : x) x16.push_back(bf16(f));
  ktfx_linear_call c = {};
  c.matrix = w.matrix;
  c.weights = w.packed.get();
  c.bias = w.bias.data();
  c.x = half ? (const void*)x16.data() : x.data();
  c.out = half ? (void*)out16.data() : out.data();
  c.rows = rows;
  c.x_dtype = half ? KTFX_BF16 : KTFX_F32;
  c.int8_activations = int8;
  CHECK(ktfx_linear(&c) == KTFX_OK && c.status == KTFX_OK);
  double wrong = 0, total = 1e-30;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t n = 0; n < N; ++n) {
      double y = w.bias[n];
      for (int64_t k = 0; k < K; ++k)
        y += (double)w.plain[n * K + k] * (half ? from_bf16(x16[t * K + k]) : x[t * K + k]);
      const double got = half ? from_bf16(out16[t * N + n]) : out[t * N + n];
      wrong += (got - y) * (got - y);
      total += y * y;
    }
  return std::sqrt(wrong / total);
}

void check_formats() {
  const std::string names = ktfx_isas();
  for (size_t at = 0; at < names.size();) {
    const size_t end = std::min(names.find(',', at), names.size());
    const std::string isa = names.substr(at, end - at);
    at = end + 1;
    CHECK(ktfx_set_isa(isa.c_str()) == KTFX_OK);
    for (int format = KTFX_FMT_F32; format <= KTFX_FMT_MXFP4; ++format)
      for (auto shape : {std::vector<int>{17, 33}, {40, 50}, {130, 24}, {16, 1100}}) {
        const Weight w = make_weight(shape[0], shape[1], format);
        for (int64_t rows : {1, 5, 13, 97, 200})
          for (int half = 0; half < 2; ++half)
            for (int int8 = 0; int8 < (format >= KTFX_FMT_INT4 ? 2 : 1); ++int8) {
              const double e = run(w, rows, half, int8);
              if (!(e < (int8 ? 3e-2 : half ? 8e-3 : 3e-4))) {
                fprintf(stderr, "%s format %d rows %ld half %d int8 %d: error %g\n", isa.c_str(), format, (long)rows, half,
                        int8, e);
                exit(1);
              }
            }
      }
  }
  CHECK(ktfx_set_isa(names.substr(0, names.find(',')).c_str()) == KTFX_OK);
}

void check_threads() {
  const Weight w = make_weight(70, 96, KTFX_FMT_INT4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&w, i] {
      for (int j = 0; j < 10; ++j) CHECK(run(w, 1 + 30 * i, false, false) < 3e-4);
    });
  for (int n : {3, 1, 4}) CHECK(ktfx_set_threads(n, n > 2 ? 2 : 1) == KTFX_OK);
  for (auto& t : threads) t.join();
}

void check_errors() {
  const Weight w = make_weight(20, 40, KTFX_FMT_INT8);
  ktfx_linear_call c = {};
  c.matrix = w.matrix;
  CHECK(ktfx_linear(&c) == KTFX_OK);  // no rows, nothing to do
  c.rows = 1;
  CHECK(ktfx_linear(&c) == KTFX_BAD_ARGUMENT && strstr(c.message, "null"));
  float x[40] = {}, out[20];
  c.weights = w.packed.get();
  c.x = x;
  c.out = out;
  c.x_dtype = KTFX_I64;
  CHECK(ktfx_linear(&c) == KTFX_BAD_ARGUMENT && strstr(c.message, "dtype"));
  CHECK(ktfx_linear(nullptr) == KTFX_BAD_ARGUMENT);
}

}  // namespace

int main() {
  check_formats();
  check_threads();
  check_errors();
  puts("ok");
  return 0;
}
