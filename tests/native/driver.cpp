// The library under the sanitizers, without Python: every format and instruction set over awkward shapes, bad ids, several
// threads, tickets, the poller, a change of the pool while calls run, and a fork. Prints "ok" and returns 0 if all held.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../ktfx/cpu_kernels/ktfx_cpu.h"

namespace {

#define CHECK(what)                                                     \
  do {                                                                  \
    if (!(what)) {                                                      \
      fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #what); \
      exit(1);                                                          \
    }                                                                   \
  } while (0)

struct Layer {
  ktfx_layer layer = {};
  std::vector<float> gate_up, down, up_bias, down_bias;  // what the kernels compute with
  std::unique_ptr<uint8_t, void (*)(void*)> up{nullptr, free}, dn{nullptr, free};
};

uint8_t* aligned(int64_t bytes) { return (uint8_t*)aligned_alloc(64, (bytes + 63) / 64 * 64); }

std::vector<float> randoms(int64_t n, unsigned seed) {
  std::mt19937 g(seed);
  std::normal_distribution<float> d(0.0f, 0.2f);
  std::vector<float> v(n);
  for (auto& f : v) f = d(g);
  return v;
}

std::unique_ptr<Layer> make_layer(int E, int H, int I, int format, int group, bool int8) {
  auto out = std::make_unique<Layer>();
  ktfx_layer& l = out->layer;
  l.num_experts = E;
  l.hidden = H;
  l.intermediate = I;
  l.activation = KTFX_SILU;
  l.gate = KTFX_GATE_MUL;
  l.int8_activations = int8;
  CHECK(ktfx_matrix_layout(&l.up, format, group, KTFX_F32, 2 * I, H, 1) == KTFX_OK);
  CHECK(ktfx_matrix_layout(&l.down, format, group, KTFX_F32, H, I, 0) == KTFX_OK);
  out->up.reset(aligned(E * l.up.tiles * l.up.tile_bytes));
  out->dn.reset(aligned(E * l.down.tiles * l.down.tile_bytes));
  out->gate_up.resize((int64_t)E * 2 * I * H);
  out->down.resize((int64_t)E * H * I);
  out->up_bias = randoms(E * 2 * I, 5);
  out->down_bias = randoms(E * H, 6);
  char message[KTFX_MESSAGE];
  for (int down = 0; down < 2; ++down) {
    const ktfx_matrix& m = down ? l.down : l.up;
    uint8_t* packed = down ? out->dn.get() : out->up.get();
    std::vector<float>& plain = down ? out->down : out->gate_up;
    std::vector<float> from = randoms(plain.size(), 7 + down);
    std::vector<uint16_t> halves(from.size());
    for (size_t i = 0; i < from.size(); ++i) {
      uint32_t u;
      memcpy(&u, &from[i], 4);
      halves[i] = (uint16_t)(u >> 16);
    }
    const bool bf16 = format == KTFX_FMT_BF16, f16 = format == KTFX_FMT_F16;
    if (f16)
      for (auto& h : halves) h = (uint16_t)(0x3000 | (h & 0x83ff));  // halves of moderate size
    std::vector<ktfx_source> sources(E);
    for (int e = 0; e < E; ++e) {
      sources[e] = {};
      const int64_t at = (int64_t)e * m.N * m.K;
      sources[e].data = bf16 || f16 ? (const void*)(halves.data() + at) : from.data() + at;
      sources[e].dtype = bf16 ? KTFX_BF16 : f16 ? KTFX_F16 : KTFX_F32;
      sources[e].row_stride = m.K;
      sources[e].column_stride = 1;
    }
    ktfx_place(packed, &m, E, down);
    CHECK(ktfx_pack(&m, sources.data(), E, packed, message) == KTFX_OK);
    if (format <= KTFX_FMT_F16) {
      const int64_t bytes = plain.size() * (bf16 || f16 ? 2 : 4);
      std::vector<char> back(bytes, 1);
      std::vector<ktfx_source> targets = sources;
      for (int e = 0; e < E; ++e) targets[e].data = back.data() + e * (bytes / E);
      CHECK(ktfx_restore(&m, packed, targets.data(), E, message) == KTFX_OK);
      CHECK(memcmp(back.data(), sources[0].data, bytes) == 0);
      uint64_t own[2], same[2], other[2];
      CHECK(ktfx_hash(sources[0].data, bytes, own) == KTFX_OK && ktfx_hash(back.data(), bytes, same) == KTFX_OK);
      back[bytes - 1] ^= 1;
      CHECK(ktfx_hash(back.data(), bytes, other) == KTFX_OK);
      CHECK(own[0] == same[0] && own[1] == same[1] && own[0] != other[0] && own[1] != other[1]);
    } else {
      CHECK(ktfx_restore(&m, packed, sources.data(), E, message) == KTFX_BAD_ARGUMENT);
    }
    for (int e = 0; e < E; ++e)
      ktfx_unpack(&m, packed + e * m.tiles * m.tile_bytes, plain.data() + (int64_t)e * m.N * m.K);
  }
  l.up_weights = out->up.get();
  l.down_weights = out->dn.get();
  l.up_bias = out->up_bias.data();
  l.down_bias = out->down_bias.data();
  return out;
}

struct Inputs {
  std::vector<float> x, weights, out;
  std::vector<int64_t> ids;
  ktfx_call call = {};
};

std::unique_ptr<Inputs> make_inputs(const Layer& layer, int T, int K) {
  auto in = std::make_unique<Inputs>();
  const ktfx_layer& l = layer.layer;
  in->x = randoms((int64_t)T * l.hidden, 1);
  in->weights = randoms((int64_t)T * K, 2);
  in->out.assign((int64_t)T * l.hidden, NAN);
  for (int i = 0; i < T * K; ++i) in->ids.push_back((i * 7 + i / 3) % l.num_experts);
  ktfx_call& c = in->call;
  c.layer = &l;
  c.x = in->x.data();
  c.ids = in->ids.data();
  c.weights = in->weights.data();
  c.out = in->out.data();
  c.tokens = T;
  c.chosen = K;
  c.x_dtype = c.weight_dtype = KTFX_F32;
  c.id_dtype = KTFX_I64;
  return in;
}

std::vector<float> reference(const Layer& layer, const Inputs& in) {
  const ktfx_layer& l = layer.layer;
  const int H = l.hidden, I = l.intermediate;
  std::vector<float> out(in.x.size(), 0.0f), h(I);
  for (int64_t s = 0; s < in.call.tokens * in.call.chosen; ++s) {
    const int64_t t = s / in.call.chosen, e = in.ids[s];
    const float* x = in.x.data() + t * H;
    for (int i = 0; i < I; ++i) {
      double g = layer.up_bias[e * 2 * I + i], u = layer.up_bias[e * 2 * I + I + i];
      for (int k = 0; k < H; ++k) {
        g += (double)layer.gate_up[(e * 2 * I + i) * H + k] * x[k];
        u += (double)layer.gate_up[(e * 2 * I + I + i) * H + k] * x[k];
      }
      h[i] = (float)(g / (1.0 + std::exp(-g)) * u);
    }
    for (int n = 0; n < H; ++n) {
      double y = layer.down_bias[e * H + n];
      for (int k = 0; k < I; ++k) y += (double)layer.down[(e * H + n) * I + k] * h[k];
      out[t * H + n] += (float)(in.weights[s] * y);
    }
  }
  return out;
}

double error(const std::vector<float>& got, const std::vector<float>& want) {
  double wrong = 0, total = 1e-30;
  for (size_t i = 0; i < got.size(); ++i) {
    wrong += (got[i] - want[i]) * (double)(got[i] - want[i]);
    total += (double)want[i] * want[i];
  }
  return std::sqrt(wrong / total);
}

// The same call with x and the result in bf16, as AMX takes them.
double error_in_bf16(const Layer& layer, Inputs& in) {
  std::vector<uint16_t> x, out(in.x.size(), 0xffff);
  for (float& v : in.x) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    x.push_back((uint16_t)(bits >> 16));
    bits &= 0xffff0000u;
    memcpy(&v, &bits, 4);
  }
  in.call.x = x.data();
  in.call.out = out.data();
  in.call.x_dtype = KTFX_BF16;
  CHECK(ktfx_experts(&in.call) == KTFX_OK);
  for (size_t i = 0; i < out.size(); ++i) {
    const uint32_t bits = (uint32_t)out[i] << 16;
    memcpy(&in.out[i], &bits, 4);
  }
  return error(in.out, reference(layer, in));
}

void check_formats() {
  const std::string names = ktfx_isas();
  for (size_t at = 0; at < names.size();) {
    const size_t end = std::min(names.find(',', at), names.size());
    const std::string isa = names.substr(at, end - at);
    at = end + 1;
    CHECK(ktfx_set_isa(isa.c_str()) == KTFX_OK);
    for (int format = KTFX_FMT_F32; format <= KTFX_FMT_MXFP4; ++format)
      for (int int8 = 0; int8 < (format >= KTFX_FMT_INT4 ? 2 : 1); ++int8)
        for (auto shape : {std::vector<int>{3, 33, 17, 1, 2}, {1, 40, 50, 23, 1}, {4, 96, 40, 50, 3}, {2, 20, 24, 130, 2}, {2, 128, 64, 105, 2}}) {
          auto layer = make_layer(shape[0], shape[1], shape[2], format, 32, int8);
          auto in = make_inputs(*layer, shape[3], shape[4]);
          CHECK(ktfx_experts(&in->call) == KTFX_OK);
          const double e = error(in->out, reference(*layer, *in));
          if (!(e < (int8 ? 3e-2 : 3e-4))) {
            fprintf(stderr, "%s format %d int8 %d: error %g\n", isa.c_str(), format, int8, e);
            exit(1);
          }
          const double rounded = error_in_bf16(*layer, *in);
          if (!(rounded < (int8 ? 3e-2 : 1e-2))) {
            fprintf(stderr, "%s format %d int8 %d in bf16: error %g\n", isa.c_str(), format, int8, rounded);
            exit(1);
          }
        }
  }
  CHECK(ktfx_set_isa(names.substr(0, names.find(',')).c_str()) == KTFX_OK);
  CHECK(ktfx_set_isa("none such") == KTFX_BAD_ARGUMENT);
}

// Rows and columns in either order of memory, from sources of every dtype without slack, give the same tiles; a value that is
// not finite is found.
void check_packing() {
  const std::string names = ktfx_isas();
  const int N = 2 * 200, K = 150;
  const std::vector<float> from = randoms((int64_t)N * K, 11);
  for (size_t at = 0; at < names.size();) {
    const size_t end = std::min(names.find(',', at), names.size());
    CHECK(ktfx_set_isa(names.substr(at, end - at).c_str()) == KTFX_OK);
    at = end + 1;
    for (int format = KTFX_FMT_FP8; format <= KTFX_FMT_MXFP4; ++format)
      for (int dtype : {KTFX_F32, KTFX_BF16, KTFX_F16}) {
        const int e = dtype == KTFX_F32 ? 4 : 2;
        std::vector<char> plain((size_t)N * K * e), turned(plain.size());
        for (int n = 0; n < N; ++n)
          for (int k = 0; k < K; ++k) {
            uint32_t bits;
            memcpy(&bits, &from[(int64_t)n * K + k], 4);
            if (dtype == KTFX_BF16) bits >>= 16;
            if (dtype == KTFX_F16) bits = 0x2000 | (bits >> 16 & 0x9fff);
            memcpy(plain.data() + ((int64_t)n * K + k) * e, &bits, e);
            memcpy(turned.data() + ((int64_t)k * N + n) * e, &bits, e);
          }
        ktfx_matrix m;
        CHECK(ktfx_matrix_layout(&m, format, 64, dtype, N, K, 1) == KTFX_OK);
        const int64_t bytes = m.tiles * m.tile_bytes;
        std::unique_ptr<uint8_t, void (*)(void*)> a(aligned(bytes), free), b(aligned(bytes), free);
        ktfx_source s = {};
        char message[KTFX_MESSAGE];
        s.dtype = dtype;
        s.data = plain.data();
        s.row_stride = K;
        s.column_stride = 1;
        CHECK(ktfx_pack(&m, &s, 1, a.get(), message) == KTFX_OK);
        s.data = turned.data();
        s.row_stride = 1;
        s.column_stride = N;
        CHECK(ktfx_pack(&m, &s, 1, b.get(), message) == KTFX_OK);
        CHECK(memcmp(a.get(), b.get(), bytes) == 0);
        const uint32_t infinite = dtype == KTFX_F32 ? 0xff800000u : dtype == KTFX_BF16 ? 0xff80u : 0xfc00u;
        memcpy(turned.data() + ((int64_t)(K - 1) * N + N - 1) * e, &infinite, e);
        CHECK(ktfx_pack(&m, &s, 1, b.get(), message) == KTFX_BAD_ARGUMENT && strstr(message, "NaN"));
      }
  }
  CHECK(ktfx_set_isa(names.substr(0, names.find(',')).c_str()) == KTFX_OK);
}

void check_errors() {
  auto layer = make_layer(3, 32, 16, KTFX_FMT_F32, 0, false);
  auto in = make_inputs(*layer, 5, 2);
  in->ids[3] = 3;
  CHECK(ktfx_experts(&in->call) == KTFX_BAD_ID && strstr(in->call.message, "expert id 3 of token 1"));
  const int64_t ticket = ktfx_submit(&in->call);
  char message[KTFX_MESSAGE];
  CHECK(ktfx_wait(ticket, message) == KTFX_BAD_ID && ktfx_wait(ticket, message) == KTFX_BAD_ARGUMENT);
  in->ids[3] = 0;
  in->call.x_dtype = 77;
  CHECK(ktfx_experts(&in->call) == KTFX_BAD_ARGUMENT);
  in->call.x_dtype = KTFX_F32;
  in->call.layer = nullptr;
  CHECK(ktfx_experts(&in->call) == KTFX_BAD_ARGUMENT);
}

void check_profile() {
  auto layer = make_layer(4, 64, 48, KTFX_FMT_INT8, 0, false);
  auto in = make_inputs(*layer, 40, 2);
  double sums[KTFX_PROFILE];
  ktfx_profile(1, nullptr);
  CHECK(ktfx_experts(&in->call) == KTFX_OK && ktfx_experts(&in->call) == KTFX_OK);
  ktfx_profile(0, sums);
  CHECK(sums[0] == 2 && sums[2] > 0 && sums[6] > 0 && sums[10] > 0);
  CHECK(ktfx_experts(&in->call) == KTFX_OK);
  ktfx_profile(0, sums);
  CHECK(sums[0] == 0);
}

void check_threads() {
  auto layer = make_layer(4, 64, 48, KTFX_FMT_INT4, 32, false);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&layer, i] {
      auto in = make_inputs(*layer, 1 + 12 * i, 2);
      CHECK(ktfx_experts(&in->call) == KTFX_OK);
      const std::vector<float> want = in->out;
      for (int j = 0; j < 20; ++j) {
        if (j % 2) CHECK(ktfx_wait(ktfx_submit(&in->call), nullptr) == KTFX_OK);
        else CHECK(ktfx_experts(&in->call) == KTFX_OK);
        CHECK(in->out == want);
      }
    });
  for (int n : {3, 1, 4}) CHECK(ktfx_set_threads(n, n > 2 ? 2 : 1) == KTFX_OK);
  for (auto& t : threads) t.join();
}

void check_poller() {
  auto layer = make_layer(4, 64, 48, KTFX_FMT_INT8, 0, false);
  auto in = make_inputs(*layer, 3, 2);
  CHECK(ktfx_experts(&in->call) == KTFX_OK);
  const std::vector<float> want = in->out;
  uint32_t start = 0, done = 0;
  ktfx_poller* p = ktfx_poller_create();
  CHECK(p && ktfx_poller_add(p, &in->call, &start, &done) == KTFX_OK);
  for (int armed = 1; armed >= 0; --armed) {
    ktfx_poller_arm(p, armed);
    for (int i = 0; i < 5; ++i) {
      __atomic_store_n(&start, 1u, __ATOMIC_RELEASE);
      uint32_t flag;
      while (!(flag = __atomic_load_n(&done, __ATOMIC_ACQUIRE))) std::this_thread::yield();
      CHECK(flag == 1 && in->out == want);
      __atomic_store_n(&done, 0u, __ATOMIC_RELEASE);
    }
  }
  __atomic_store_n(&start, 1u, __ATOMIC_RELEASE);
  ktfx_poller_destroy(p);
  CHECK(done != 0);
}

void check_fork() {
  auto layer = make_layer(3, 32, 16, KTFX_FMT_BF16, 0, false);
  auto in = make_inputs(*layer, 9, 2);
  CHECK(ktfx_experts(&in->call) == KTFX_OK);
  const pid_t child = fork();
  if (child == 0) _exit(ktfx_experts(&in->call) == KTFX_OK ? 0 : 1);
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(ktfx_abi() == KTFX_ABI && ktfx_set_threads(3, 1) == KTFX_OK);
  check_formats();
  check_packing();
  check_errors();
  check_profile();
  check_threads();
  check_poller();
  if (argc < 2 || strcmp(argv[1], "--no-fork")) check_fork();  // ThreadSanitizer does not follow threads into a child
  puts("ok");
  return 0;
}
