// The model's tensors to tiles and back. A task packs eight tiles of one expert, so that no second copy ever exists.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace ktfx {
namespace {

constexpr int kTilesTask = 8;

int dtype_bytes(int dtype) { return dtype == KTFX_F32 ? 4 : dtype == KTFX_E8M0 ? 1 : 2; }
bool four_bits(int format) { return format >= KTFX_FMT_INT4; }
int64_t row_words(const ktfx_matrix& m) {
  switch (m.format) {
    case KTFX_FMT_F32: return m.Kp;
    case KTFX_FMT_BF16:
    case KTFX_FMT_F16: return m.Kp / 2;
    case KTFX_FMT_FP8:
    case KTFX_FMT_INT8: return m.Kp / 4;
    default: return m.Kp / 8;
  }
}
int64_t groups_of(const ktfx_matrix& m) {
  if (m.format <= KTFX_FMT_F16) return 0;
  if (m.format == KTFX_FMT_INT8) return 1;
  if (m.format == KTFX_FMT_FP8) return (m.Kp + kFp8Block - 1) / kFp8Block;
  return m.Kp / m.group;
}

// The plain row (gate rows, then up rows) that tile t holds as output i; -1 past the end.
int64_t plain_row(const ktfx_matrix& m, int64_t tile, int i) {
  if (!m.paired) {
    const int64_t n = tile * kTile + i;
    return n < m.N ? n : -1;
  }
  const int64_t half = m.N / 2, n = tile / 2 * kTile + i;
  return n >= half ? -1 : tile % 2 ? half + n : n;
}

int64_t source_row(const ktfx_matrix& m, const ktfx_source& s, int64_t plain) {
  if (!s.interleaved) return plain;
  const int64_t half = m.N / 2;
  return plain < half ? 2 * plain : 2 * (plain - half) + 1;
}

float load_float(const void* p, int dtype) {
  float f;
  kernels().to_f32(p, dtype, &f, 1, 1.0f);
  return f;
}

struct Packing {
  const ktfx_matrix* m;
  const ktfx_source* sources;
  uint8_t* out;
  const KernelTable* kernels;
  int64_t tasks_expert;
  std::vector<float> block_scales;  // FP8 from floats: [E][row blocks][K blocks]
  std::atomic<int64_t> bad{-1};     // an expert that holds NaN or inf
};

// A row of the source as Kp floats; zeros past K.
void read_row(const Packing& p, const ktfx_source& s, int64_t plain, float* out) {
  const ktfx_matrix& m = *p.m;
  const int e = dtype_bytes(s.dtype);
  const char* from = (const char*)s.data + source_row(m, s, plain) * s.row_stride * e;
  if (s.column_stride == 1) p.kernels->to_f32(from, s.dtype, out, m.K, 1.0f);
  else
    for (int64_t k = 0; k < m.K; ++k) p.kernels->to_f32(from + k * s.column_stride * e, s.dtype, out + k, 1, 1.0f);
  std::fill(out + m.K, out + m.Kp, 0.0f);
}

void scale_task(void* context, int, int64_t task, int) {
  Packing& p = *(Packing*)context;
  const ktfx_matrix& m = *p.m;
  const int64_t row_blocks = (m.N + kFp8Block - 1) / kFp8Block, column_blocks = groups_of(m);
  const int64_t e = task / row_blocks, rb = task % row_blocks;
  std::vector<float> row(m.Kp);
  float* scales = p.block_scales.data() + task * column_blocks;
  for (int64_t n = rb * kFp8Block; n < std::min<int64_t>(m.N, (rb + 1) * kFp8Block); ++n) {
    read_row(p, p.sources[e], n, row.data());
    for (int64_t k = 0; k < m.Kp; k += kFp8Block) {
      // Magnitudes compare as their bits do, which the compiler turns into vectors.
      int32_t top = 0;
      const int64_t end = std::min<int64_t>(m.Kp, k + kFp8Block);
      for (int64_t i = k; i < end; ++i) {
        int32_t bits;
        memcpy(&bits, &row[i], 4);
        top = std::max(top, bits & 0x7fffffff);
      }
      float largest;
      memcpy(&largest, &top, 4);
      scales[k / kFp8Block] = std::max(scales[k / kFp8Block], largest);
    }
  }
  for (int64_t b = 0; b < column_blocks; ++b) scales[b] /= 448.0f;
}

// The words of one row that is quantised already.
void quantized_row(const Packing& p, const ktfx_source& s, int64_t plain, uint32_t* words, char* scales,
                   uint8_t* zeros) {
  const ktfx_matrix& m = *p.m;
  const int64_t row = source_row(m, s, plain), G = groups_of(m);
  if (!four_bits(m.format)) {
    memcpy(words, (const char*)s.data + row * m.K, m.K);
    memset((char*)words + m.K, 0, m.Kp - m.K);
    if (m.format == KTFX_FMT_INT8) memcpy(scales, (const float*)s.scales + row, 4);
    else
      for (int64_t g = 0; g < G; ++g)
        memcpy(scales + 4 * g, (const float*)s.scales + row / kFp8Block * G + g, 4);
    return;
  }
  const uint8_t* from = (const uint8_t*)s.data + row * m.Kp / 2;
  auto code = [&](int64_t k) {
    const uint8_t byte = from[k / 32 * 16 + k % 16];
    return (uint32_t)(k % 32 < 16 ? byte & 15 : byte >> 4);
  };
  for (int64_t w = 0; w < m.Kp / 8; ++w) {
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) word |= (code(8 * w + j) | code(8 * w + 4 + j) << 4) << (8 * j);
    words[w] = word;
  }
  const int e = dtype_bytes(m.scale_dtype);
  memcpy(scales, (const char*)s.scales + row * G * e, G * e);
  if (m.format == KTFX_FMT_INT4ZP) memcpy(zeros, (const uint8_t*)s.zeros + row * G, G);
}

void pack_task(void* context, int, int64_t task, int) {
  Packing& p = *(Packing*)context;
  const ktfx_matrix& m = *p.m;
  const int64_t expert = task / p.tasks_expert, first = task % p.tasks_expert * kTilesTask;
  const ktfx_source& s = p.sources[expert];
  const int64_t W = row_words(m), G = groups_of(m);
  const int se = dtype_bytes(m.scale_dtype);
  const bool floats = m.format <= KTFX_FMT_F16, scaled = !floats;
  const bool straight = floats && s.column_stride == 1 && m.K == m.Kp;
  std::vector<uint32_t> words(W * (kTile + 1), 0u);  // the last row stays zero: rows past the end read it
  std::vector<char> scales(scaled ? G * se * kTile : 0);
  std::vector<uint8_t> zeros(m.format == KTFX_FMT_INT4ZP ? G * kTile : 0);
  std::vector<float> row(floats ? 0 : m.Kp);
  for (int64_t tile = first; tile < std::min<int64_t>(first + kTilesTask, m.tiles); ++tile) {
    uint8_t* out = p.out + (expert * m.tiles + tile) * m.tile_bytes;
    const uint32_t* rows[kTile];
    for (int i = 0; i < kTile; ++i) {
      const int64_t n = plain_row(m, tile, i);
      uint32_t* own = words.data() + i * W;
      rows[i] = n < 0 ? words.data() + kTile * W : own;
      char* sc = scales.data() + i * G * se;
      uint8_t* z = zeros.data() + i * G;
      if (n < 0) {
        if (scaled) memset(sc, 0, G * se);
        if (!zeros.empty()) memset(z, 0, G);
        // Zero weights: the codes that stand for zero.
        if (m.format == KTFX_FMT_INT4) {
          std::fill(own, own + W, 0x88888888u);
          rows[i] = own;
        }
        continue;
      }
      const int e = dtype_bytes(s.dtype);
      if (straight) {
        rows[i] = (const uint32_t*)((const char*)s.data + source_row(m, s, n) * s.row_stride * e);
      } else if (floats) {
        const char* from = (const char*)s.data + source_row(m, s, n) * s.row_stride * e;
        if (s.column_stride == 1) memcpy(own, from, m.K * e);
        else if (e == 2)
          for (int64_t k = 0; k < m.K; ++k) memcpy((char*)own + 2 * k, from + k * s.column_stride * 2, 2);
        else
          for (int64_t k = 0; k < m.K; ++k) memcpy(own + k, from + k * s.column_stride * 4, 4);
        memset((char*)own + m.K * e, 0, (m.Kp - m.K) * e);
      } else if (s.quantized) {
        quantized_row(p, s, n, own, sc, z);
      } else {
        read_row(p, s, n, row.data());
        const float* in = nullptr;
        if (m.format == KTFX_FMT_FP8) {
          const int64_t row_blocks = (m.N + kFp8Block - 1) / kFp8Block;
          in = p.block_scales.data() + (expert * row_blocks + n / kFp8Block) * G;
          memcpy(sc, in, G * 4);
        }
        if (!p.kernels->encode(&m, row.data(), in, own, sc, z)) p.bad.store(expert, std::memory_order_relaxed);
      }
    }
    p.kernels->transpose(rows, W, (uint32_t*)out);
    if (m.format == KTFX_FMT_F16) {  // this one lies input by input: 16 halves, then the next 16
      for (int64_t w = 0; w < W; ++w) {
        uint16_t pair[2][kTile];
        const uint32_t* at = (const uint32_t*)out + w * kTile;
        for (int i = 0; i < kTile; ++i) {
          pair[0][i] = (uint16_t)at[i];
          pair[1][i] = (uint16_t)(at[i] >> 16);
        }
        memcpy(out + w * 64, pair, 64);
      }
    }
    const int64_t used = m.zero_offset + (zeros.empty() ? 0 : G * kTile);
    memset(out + used, 0, m.tile_bytes - used);  // equal weights give equal bytes
    for (int64_t g = 0; g < (scaled ? G : 0); ++g)
      for (int i = 0; i < kTile; ++i) {
        memcpy(out + m.scale_offset + (g * kTile + i) * se, scales.data() + (i * G + g) * se, se);
        if (!zeros.empty()) out[m.zero_offset + g * kTile + i] = zeros[i * G + g];
      }
  }
}

// Tiles back to rows, for the formats that do not round.
void restore_task(void* context, int, int64_t task, int) {
  const Packing& p = *(const Packing*)context;
  const ktfx_matrix& m = *p.m;
  const int64_t expert = task / p.tasks_expert, first = task % p.tasks_expert * kTilesTask;
  const ktfx_source& target = p.sources[expert];
  const int e = m.format == KTFX_FMT_F32 ? 4 : 2;
  std::vector<char> row(m.Kp * e);
  for (int64_t tile = first; tile < std::min<int64_t>(first + kTilesTask, m.tiles); ++tile) {
    const uint8_t* from = p.out + (expert * m.tiles + tile) * m.tile_bytes;
    for (int i = 0; i < kTile; ++i) {
      const int64_t n = plain_row(m, tile, i);
      if (n < 0) continue;
      char* to = (char*)target.data + source_row(m, target, n) * target.row_stride * e;
      const bool straight = target.column_stride == 1 && m.K == m.Kp;
      char* line = straight ? to : row.data();
      if (m.format == KTFX_FMT_F16)
        for (int64_t k = 0; k < m.K; ++k) memcpy(line + 2 * k, from + (k * kTile + i) * 2, 2);
      else  // a 32-bit word of a row is one F32 or two BF16
        for (int64_t w = 0; w < m.Kp * e / 4; ++w) memcpy(line + 4 * w, from + (w * kTile + i) * 4, 4);
      if (straight) continue;
      if (target.column_stride == 1) memcpy(to, line, m.K * e);
      else
        for (int64_t k = 0; k < m.K; ++k) memcpy(to + k * target.column_stride * e, line + k * e, e);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kHashPiece = 1 << 20;

uint64_t mixed(uint64_t h) {
  h = (h ^ h >> 32) * 0xd6e8feb86659fd93ull;
  h = (h ^ h >> 32) * 0xd6e8feb86659fd93ull;
  return h ^ h >> 32;
}

struct Hashing {
  const char* data;
  int64_t bytes;
  std::vector<uint64_t> sums;  // two a piece
};

void hash_task(void* context, int, int64_t task, int) {
  Hashing& h = *(Hashing*)context;
  const char* at = h.data + task * kHashPiece;
  const int64_t n = std::min(kHashPiece, h.bytes - task * kHashPiece);
  uint64_t lanes[4] = {0x9e3779b97f4a7c15ull, 0xbf58476d1ce4e5b9ull, 0x94d049bb133111ebull, 0x2545f4914f6cdd1dull};
  auto step = [&lanes](const char* from) {
    for (int i = 0; i < 4; ++i) {
      uint64_t word;
      memcpy(&word, from + 8 * i, 8);
      const uint64_t x = (lanes[i] ^ word) * 0x9fb21c651e98df25ull;
      lanes[i] = x << 29 | x >> 35;
    }
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) step(at + i);
  char tail[32] = {};
  memcpy(tail, at + i, n - i);
  step(tail);
  const uint64_t a = mixed(lanes[0] + (uint64_t)n), b = mixed(lanes[1] ^ a), c = mixed(lanes[2] ^ b);
  h.sums[2 * task] = mixed(lanes[3] ^ c);
  h.sums[2 * task + 1] = mixed(h.sums[2 * task] ^ (a + 3 * b + 5 * c));
}

float e4m3_value(uint8_t b) {
  const int e = b >> 3 & 15, f = b & 7;
  const float v = e ? std::ldexp(1.0f + f / 8.0f, e - 7) : std::ldexp(f / 8.0f, -6);
  return b & 0x80 ? -v : v;
}

// Weight (output i, input k) of a tile, without tricks: what the vector code is held to.
float tile_value(const ktfx_matrix& m, const uint8_t* t, int i, int64_t k) {
  static const float e2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const int64_t group = m.format == KTFX_FMT_INT8 ? m.Kp : m.format == KTFX_FMT_FP8 ? kFp8Block : m.group;
  const int64_t g = group ? k / group * kTile + i : 0;
  const uint8_t* scale = t + m.scale_offset + g * dtype_bytes(m.scale_dtype);
  const int code = t[k / 8 * 64 + i * 4 + k % 4] >> (k % 8 < 4 ? 0 : 4) & 15;
  switch (m.format) {
    case KTFX_FMT_F32: return load_float(t + (k * kTile + i) * 4, KTFX_F32);
    case KTFX_FMT_BF16: return load_float(t + k / 2 * 64 + i * 4 + k % 2 * 2, KTFX_BF16);
    case KTFX_FMT_F16: return load_float(t + (k * kTile + i) * 2, KTFX_F16);
    case KTFX_FMT_FP8: return e4m3_value(t[k / 4 * 64 + i * 4 + k % 4]) * load_float(scale, KTFX_F32);
    case KTFX_FMT_INT8: return (int8_t)t[k / 4 * 64 + i * 4 + k % 4] * load_float(scale, KTFX_F32);
    case KTFX_FMT_MXFP4: return std::ldexp(code & 8 ? -e2m1[code & 7] : e2m1[code], *scale - 127);
    default:
      return (float)(code - (m.format == KTFX_FMT_INT4 ? 8 : t[m.zero_offset + g])) * load_float(scale, m.scale_dtype);
  }
}

}  // namespace
}  // namespace ktfx

using namespace ktfx;

extern "C" {

int32_t ktfx_matrix_layout(ktfx_matrix* m, int32_t format, int32_t group, int32_t scale_dtype, int32_t N, int32_t K,
                           int32_t paired) {
  if (format < 0 || format > KTFX_FMT_MXFP4 || N <= 0 || K <= 0 || (paired && N % 2)) return KTFX_BAD_ARGUMENT;
  *m = {};
  m->format = format;
  m->N = N;
  m->K = K;
  m->paired = paired;
  int64_t align = 32;
  if (format == KTFX_FMT_INT4 || format == KTFX_FMT_INT4ZP) {
    if (group != 32 && group != 64 && group != 128) return KTFX_BAD_ARGUMENT;
    if (scale_dtype < 0 || scale_dtype > KTFX_F16) return KTFX_BAD_ARGUMENT;
    align = group;
  }
  m->scale_dtype = format == KTFX_FMT_MXFP4 ? KTFX_E8M0 : four_bits(format) ? scale_dtype : KTFX_F32;
  m->group = format == KTFX_FMT_MXFP4 ? 32 : four_bits(format) ? group : format == KTFX_FMT_FP8 ? kFp8Block : 0;
  const int64_t Kp = (K + align - 1) / align * align;
  if (Kp > INT32_MAX / 64) return KTFX_BAD_ARGUMENT;
  m->Kp = (int32_t)Kp;
  m->tiles = paired ? 2 * ((N / 2 + kTile - 1) / kTile) : (N + kTile - 1) / kTile;
  int64_t bytes = row_words(*m) * kTile * 4;
  m->scale_offset = bytes;
  if (format > KTFX_FMT_F16) bytes += groups_of(*m) * kTile * dtype_bytes(m->scale_dtype);
  m->zero_offset = bytes;
  if (format == KTFX_FMT_INT4ZP) bytes += groups_of(*m) * kTile;
  m->tile_bytes = (bytes + 63) & ~63ll;
  return KTFX_OK;
}

int32_t ktfx_pack(const ktfx_matrix* m, const ktfx_source* sources, int32_t experts, uint8_t* out, char* message) {
  try {
    Packing p;
    p.m = m;
    p.sources = sources;
    p.out = out;
    p.kernels = &kernels();
    p.tasks_expert = (m->tiles + kTilesTask - 1) / kTilesTask;
    std::shared_ptr<Pool> workers = pool();
    std::lock_guard<std::mutex> hold(workers->busy);
    workers->begin_call();
    int64_t tasks[kMaxShares] = {};
    if (m->format == KTFX_FMT_FP8 && experts && !sources[0].quantized) {
      const int64_t row_blocks = (m->N + kFp8Block - 1) / kFp8Block;
      p.block_scales.assign(experts * row_blocks * groups_of(*m), 0.0f);
      tasks[0] = experts * row_blocks;
      workers->run(tasks, scale_task, &p);
    }
    tasks[0] = experts * p.tasks_expert;
    workers->run(tasks, pack_task, &p);
    if (p.bad >= 0) {
      snprintf(message, KTFX_MESSAGE, "the weight of expert %lld holds NaN or inf", (long long)p.bad.load());
      return KTFX_BAD_ARGUMENT;
    }
    return KTFX_OK;
  } catch (const std::exception& e) {
    snprintf(message, KTFX_MESSAGE, "%s", e.what());
    return KTFX_NO_MEMORY;
  }
}

int32_t ktfx_restore(const ktfx_matrix* m, const uint8_t* packed, const ktfx_source* targets, int32_t experts,
                     char* message) {
  if (m->format > KTFX_FMT_F16) {
    snprintf(message, KTFX_MESSAGE, "the format rounds: the model's own numbers are not in it");
    return KTFX_BAD_ARGUMENT;
  }
  try {
    Packing p;
    p.m = m;
    p.sources = targets;
    p.out = (uint8_t*)packed;
    p.kernels = &kernels();
    p.tasks_expert = (m->tiles + kTilesTask - 1) / kTilesTask;
    std::shared_ptr<Pool> workers = pool();
    std::lock_guard<std::mutex> hold(workers->busy);
    workers->begin_call();
    int64_t tasks[kMaxShares] = {experts * p.tasks_expert};
    workers->run(tasks, restore_task, &p);
    return KTFX_OK;
  } catch (const std::exception& e) {
    snprintf(message, KTFX_MESSAGE, "%s", e.what());
    return KTFX_NO_MEMORY;
  }
}

int32_t ktfx_hash(const void* data, int64_t bytes, uint64_t out[2]) {
  try {
    const int64_t pieces = (bytes + kHashPiece - 1) / kHashPiece;
    Hashing h{(const char*)data, bytes, std::vector<uint64_t>(2 * pieces)};
    std::shared_ptr<Pool> workers = pool();
    std::lock_guard<std::mutex> hold(workers->busy);
    workers->begin_call();
    int64_t tasks[kMaxShares] = {pieces};
    workers->run(tasks, hash_task, &h);
    out[0] = mixed((uint64_t)bytes + 1);
    out[1] = mixed(out[0]);
    for (uint64_t sum : h.sums) {
      out[0] = mixed(out[0] ^ sum) + out[1];
      out[1] = mixed(out[1] + sum) ^ out[0] << 1;
    }
    return KTFX_OK;
  } catch (const std::exception&) {
    return KTFX_NO_MEMORY;
  }
}

int32_t ktfx_unpack(const ktfx_matrix* m, const uint8_t* packed, float* out) {
  for (int64_t tile = 0; tile < m->tiles; ++tile)
    for (int i = 0; i < kTile; ++i) {
      const int64_t n = plain_row(*m, tile, i);
      if (n < 0) continue;
      for (int64_t k = 0; k < m->K; ++k) out[n * m->K + k] = tile_value(*m, packed + tile * m->tile_bytes, i, k);
    }
  return KTFX_OK;
}

void ktfx_place(uint8_t* data, const ktfx_matrix* m, int32_t experts, int32_t is_down) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const int64_t expert_bytes = m->tiles * m->tile_bytes;
  const uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1);
  const uintptr_t end = ((uintptr_t)data + experts * expert_bytes) & ~(page - 1);
  if (end <= begin) return;
  madvise((void*)begin, end - begin, MADV_HUGEPAGE);
  const int shares = ktfx_shares();
  if (shares < 2 || machine().nodes < 2) return;
  const int paired = m->paired + 1;
  const int64_t units = is_down ? m->tiles : (m->tiles / paired + 3) / 4;  // what experts.cpp splits among shares
  const int64_t unit = is_down ? 1 : 4 * paired;
  for (int64_t e = 0; e < experts; ++e)
    for (int s = 0; s < shares; ++s) {
      const int64_t from = share_begin(units, s, shares) * unit;
      const int64_t to = std::min<int64_t>(m->tiles, share_begin(units, s + 1, shares) * unit);
      uintptr_t a = (uintptr_t)data + e * expert_bytes + from * m->tile_bytes, b = a + (to - from) * m->tile_bytes;
      a = (a + page - 1) & ~(page - 1);
      b &= ~(page - 1);
      unsigned long mask = 1ul << (s * machine().nodes / shares);
      if (b > a) syscall(SYS_mbind, a, b - a, 1 /* MPOL_PREFERRED */, &mask, 64ul, 2u /* MPOL_MF_MOVE */);
    }
}

}  // extern "C"
