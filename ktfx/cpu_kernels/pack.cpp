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
constexpr int32_t kEncodeInputs = 512;  // inputs transposed and rounded at a time, so that they stay in the nearest cache

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
  int64_t tiles_task, tasks_expert;
  std::atomic<int64_t> bad{-1};  // an expert that holds NaN or inf
};

template <class T>
void gather(const ktfx_matrix& m, const ktfx_source& s, const int64_t* plain, int n, uint32_t* const* out) {
  const T* from[kTile];
  for (int i = 0; i < n; ++i) from[i] = (const T*)s.data + source_row(m, s, plain[i]) * s.row_stride;
  // Input by input: neighbouring rows of a transposed weight lie side by side.
  for (int64_t k = 0; k < m.K; ++k)
    for (int i = 0; i < n; ++i) ((T*)out[i])[k] = from[i][k * s.column_stride];
}

// A transposed source has a tile's 16 rows side by side: what KernelTable::transpose would make of them can be read as it
// lies. step: 2 where gate's and up's rows alternate.
template <class T, int step>
void turn_columns_of(const T* from, int64_t stride, int64_t K, int64_t k0, int64_t k1, uint32_t* out) {
  for (int64_t k = k0; k < k1; k += 4 / (int64_t)sizeof(T), out += kTile) {
    const T *a = from + k * stride, *b = a + stride;
    if constexpr (sizeof(T) == 4) {
      for (int i = 0; i < kTile; ++i) out[i] = k < K ? a[i * step] : 0u;
    } else if (k + 1 < K) {
      for (int i = 0; i < kTile; ++i) out[i] = (uint32_t)a[i * step] | (uint32_t)b[i * step] << 16;
    } else {
      for (int i = 0; i < kTile; ++i) out[i] = k < K ? a[i * step] : 0u;
    }
  }
}

bool side_by_side(const ktfx_matrix& m, const ktfx_source& s, const int64_t* plain, int n) {
  const int64_t last = s.interleaved ? 2 * (kTile - 1) : kTile - 1;
  return s.column_stride != 1 && s.row_stride == 1 && n == kTile &&
         source_row(m, s, plain[kTile - 1]) - source_row(m, s, plain[0]) == last;
}

// Inputs [k0, k1) of the 16 rows from `plain` on, which lie side by side.
void turn_columns(const ktfx_matrix& m, const ktfx_source& s, int64_t plain, int64_t k0, int64_t k1, uint32_t* out) {
  const int64_t row = source_row(m, s, plain), stride = s.column_stride;
  const uint16_t* halves = (const uint16_t*)s.data + row;
  const uint32_t* floats = (const uint32_t*)s.data + row;
  if (dtype_bytes(s.dtype) == 2) {
    if (s.interleaved) turn_columns_of<uint16_t, 2>(halves, stride, m.K, k0, k1, out);
    else turn_columns_of<uint16_t, 1>(halves, stride, m.K, k0, k1, out);
  } else {
    if (s.interleaved) turn_columns_of<uint32_t, 2>(floats, stride, m.K, k0, k1, out);
    else turn_columns_of<uint32_t, 1>(floats, stride, m.K, k0, k1, out);
  }
}

// The source's n rows `plain`, zeros from K to Kp; where they lie as they are needed they are not copied to `buffers`.
void read_rows(const Packing& p, const ktfx_source& s, const int64_t* plain, int n, uint32_t* const* buffers,
               const uint32_t** rows) {
  const ktfx_matrix& m = *p.m;
  const int e = dtype_bytes(s.dtype);
  const bool straight = s.column_stride == 1 && m.K == m.Kp;
  for (int i = 0; i < n; ++i) {
    const char* from = (const char*)s.data + source_row(m, s, plain[i]) * s.row_stride * e;
    rows[i] = straight ? (const uint32_t*)from : buffers[i];
    if (straight) continue;
    if (s.column_stride == 1) memcpy(buffers[i], from, m.K * e);
    memset((char*)buffers[i] + m.K * e, 0, (m.Kp - m.K) * e);
  }
  if (s.column_stride == 1) return;
  if (e == 2) gather<uint16_t>(m, s, plain, n, buffers);
  else gather<uint32_t>(m, s, plain, n, buffers);
}

// Of what KernelTable::row_peaks leaves.
float largest(const int32_t* peaks, int dtype) {
  const int32_t bits = *std::max_element(peaks, peaks + kTile);
  const uint16_t half = (uint16_t)(bits >> 16);
  return dtype == KTFX_F16 ? load_float(&half, KTFX_F16) : load_float(&bits, KTFX_F32);
}

// FP8's scales of the blocks of 128 rows that some tiles touch. Tasks hold whole blocks where they can, so that their
// rows are still in a cache when they are rounded.
struct BlockScales {
  std::vector<int64_t> blocks;
  std::vector<float> scales;  // [blocks][K / 128]

  bool fill(const Packing& p, const ktfx_source& s, int64_t first, int64_t last, int64_t stride,
            uint32_t* const* buffers) {
    const ktfx_matrix& m = *p.m;
    const int64_t G = groups_of(m);
    for (int64_t tile = first; tile < last; tile += stride)
      for (int i = 0; i < kTile; ++i) {
        const int64_t n = plain_row(m, tile, i), block = n / kFp8Block;
        if (n < 0 || std::find(blocks.begin(), blocks.end(), block) != blocks.end()) continue;
        blocks.push_back(block);
      }
    scales.resize(blocks.size() * G);
    std::vector<int32_t> peaks(G * kTile);
    for (size_t b = 0; b < blocks.size(); ++b) {
      const int64_t end = std::min<int64_t>(m.N, (blocks[b] + 1) * kFp8Block);
      std::fill(peaks.begin(), peaks.end(), 0);
      for (int64_t n = blocks[b] * kFp8Block; n < end; n += kTile) {
        int64_t plain[kTile];
        const uint32_t* rows[kTile];
        const int count = (int)std::min<int64_t>(kTile, end - n);
        for (int i = 0; i < count; ++i) plain[i] = n + i;
        read_rows(p, s, plain, count, buffers, rows);
        for (int i = 0; i < count; ++i) p.kernels->row_peaks(rows[i], s.dtype, m.K, kFp8Block, peaks.data());
      }
      for (int64_t g = 0; g < G; ++g) {
        const float peak = largest(peaks.data() + g * kTile, s.dtype);
        if (!std::isfinite(peak)) return false;
        scales[b * G + g] = peak / 448.0f;
      }
    }
    return true;
  }

  const float* of(int64_t row, int64_t G) const {
    return scales.data() + (std::find(blocks.begin(), blocks.end(), row / kFp8Block) - blocks.begin()) * G;
  }
};

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
  // A block's 16 bytes hold inputs 0 to 15 in their low halves, 16 to 31 in their high ones; a word holds four inputs
  // low and the next four high.
  const uint8_t* from = (const uint8_t*)s.data + row * m.Kp / 2;
  constexpr uint32_t low = 0x0f0f0f0fu;
  for (int64_t w = 0; w < m.Kp / 8; w += 4, from += 16) {
    uint32_t b[4];
    memcpy(b, from, 16);
    words[w] = (b[0] & low) | (b[1] & low) << 4;
    words[w + 1] = (b[2] & low) | (b[3] & low) << 4;
    words[w + 2] = (b[0] >> 4 & low) | (b[1] & ~low);
    words[w + 3] = (b[2] >> 4 & low) | (b[3] & ~low);
  }
  const int e = dtype_bytes(m.scale_dtype);
  memcpy(scales, (const char*)s.scales + row * G * e, G * e);
  if (m.format == KTFX_FMT_INT4ZP) memcpy(zeros, (const uint8_t*)s.zeros + row * G, G);
}

// [i][g] elements of `bytes` bytes to [g][i].
template <class T>
void turn(const char* from, int64_t G, uint8_t* to) {
  for (int64_t g = 0; g < G; ++g)
    for (int i = 0; i < kTile; ++i) memcpy(to + (g * kTile + i) * sizeof(T), from + (i * G + g) * sizeof(T), sizeof(T));
}

// A task's memory: 16 rows of a tile and one of zeros, as words of the tile or as the source has them.
struct TileRows {
  std::vector<uint32_t> words;
  uint32_t* rows[kTile + 1];
  explicit TileRows(int64_t W) : words(W * (kTile + 1), 0u) {
    for (int i = 0; i <= kTile; ++i) rows[i] = words.data() + i * W;
  }
};

// A tile of a source that is quantised already.
void pack_quantized(const Packing& p, const ktfx_source& s, int64_t tile, TileRows& own, uint8_t* out) {
  const ktfx_matrix& m = *p.m;
  const int64_t W = row_words(m), G = groups_of(m);
  const int se = dtype_bytes(m.scale_dtype);
  std::vector<char> scales(G * se * kTile);  // of rows past the end: zero
  std::vector<uint8_t> zeros(m.format == KTFX_FMT_INT4ZP ? G * kTile : 0);
  const uint32_t* rows[kTile];
  for (int i = 0; i < kTile; ++i) {
    const int64_t n = plain_row(m, tile, i);
    rows[i] = own.rows[n < 0 ? kTile : i];
    if (n >= 0) quantized_row(p, s, n, own.rows[i], scales.data() + i * G * se, zeros.data() + i * G);
  }
  p.kernels->transpose(rows, W, (uint32_t*)out);
  if (se == 4) turn<uint32_t>(scales.data(), G, out + m.scale_offset);
  else if (se == 2) turn<uint16_t>(scales.data(), G, out + m.scale_offset);
  else turn<uint8_t>(scales.data(), G, out + m.scale_offset);
  if (!zeros.empty()) turn<uint8_t>((const char*)zeros.data(), G, out + m.zero_offset);
}

// Halves lie input by input in their tiles: 16 of them, then the next 16.
void separate_halves(uint8_t* tile, int64_t W) {
  for (int64_t w = 0; w < W; ++w) {
    uint32_t at[kTile];
    uint16_t pair[2][kTile];
    memcpy(at, tile + w * 64, 64);
    for (int i = 0; i < kTile; ++i) {
      pair[0][i] = (uint16_t)at[i];
      pair[1][i] = (uint16_t)(at[i] >> 16);
    }
    memcpy(tile + w * 64, pair, 64);
  }
}

// A tile whose values are rounded; rows past the n-th are zeros. columns: not -1, the first of 16 rows that lie side by
// side and are not in `rows`. then: the tile that comes next. scale_in: FP8's, and room for INT8's. turned: room for
// transposed rows. false: it holds NaN or inf.
bool pack_rounded(const Packing& p, const ktfx_source& s, const uint32_t* const* rows, int n, int64_t columns,
                  int64_t then, float* scale_in, std::vector<uint32_t>& turned, uint8_t* out) {
  const ktfx_matrix& m = *p.m;
  const int e = dtype_bytes(s.dtype);
  if (m.format == KTFX_FMT_INT8)
    for (int i = 0; i < kTile; ++i) {
      int32_t peaks[kTile] = {};
      if (i < n) p.kernels->row_peaks(rows[i], s.dtype, m.K, m.K, peaks);
      scale_in[i] = largest(peaks, s.dtype) / 127.0f;
      if (!std::isfinite(scale_in[i])) return false;
    }
  turned.resize((int64_t)kEncodeInputs * e / 4 * kTile);
  // The next tile's rows come from memory while this one's are rounded, where they will be read as they lie.
  const char* ahead[kTile];
  bool fetch = s.column_stride == 1 && then < m.tiles && plain_row(m, then, kTile - 1) >= 0;
  for (int i = 0; i < kTile && fetch; ++i)
    ahead[i] = (const char*)s.data + source_row(m, s, plain_row(m, then, i)) * s.row_stride * e;
  bool good = true;
  for (int32_t k = 0; k < m.Kp; k += kEncodeInputs) {
    const int32_t end = std::min(k + kEncodeInputs, m.Kp);
    if (columns >= 0) {
      turn_columns(m, s, columns, k, end, turned.data());
    } else {
      const uint32_t* at[kTile];
      for (int i = 0; i < kTile; ++i) at[i] = (const uint32_t*)((const char*)rows[i] + (int64_t)k * e);
      p.kernels->transpose(at, (int64_t)(end - k) * e / 4, turned.data());
    }
    good &= p.kernels->encode(&m, s.dtype, turned.data(), k, end, scale_in, fetch ? ahead : nullptr, out);
    for (int i = 0; i < kTile && fetch; ++i) ahead[i] += (int64_t)(end - k) * e;
  }
  return good;
}

// Tiles first, first + stride, … below `last` of one expert. false: it holds NaN or inf.
bool pack_tiles(const Packing& p, int64_t expert, int64_t first, int64_t last, int64_t stride) {
  const ktfx_matrix& m = *p.m;
  const ktfx_source& s = p.sources[expert];
  const int64_t G = groups_of(m), count = (last - first + stride - 1) / stride;
  const bool floats = m.format <= KTFX_FMT_F16, block_scaled = m.format == KTFX_FMT_FP8 && !s.quantized;
  TileRows own(s.quantized && !floats ? row_words(m) : (int64_t)m.Kp * dtype_bytes(s.dtype) / 4);
  std::vector<uint32_t> turned;
  std::vector<float> scale_in(G * kTile);
  BlockScales blocks;
  if (block_scaled && !blocks.fill(p, s, first, last, stride, own.rows)) return false;
  bool good = true;
  for (int64_t j = 0; j < count; ++j) {
    // What was read last for FP8's scales is still in a cache: begin with it. The tile that is fetched meanwhile is
    // the next one, or one of the blocks whose scales come next.
    const int64_t tile = first + (block_scaled ? count - 1 - j : j) * stride;
    uint8_t* out = p.out + (expert * m.tiles + tile) * m.tile_bytes;
    if (s.quantized && !floats) {
      pack_quantized(p, s, tile, own, out);
    } else {
      const uint32_t* rows[kTile];
      int64_t plain[kTile];
      int n = 0;  // rows past the end are the last ones
      while (n < kTile && (plain[n] = plain_row(m, tile, n)) >= 0) ++n;
      // INT8's and FP8's scales are found row by row.
      const int64_t columns = (floats || four_bits(m.format)) && side_by_side(m, s, plain, n) ? plain[0] : -1;
      if (columns < 0) read_rows(p, s, plain, n, own.rows, rows);
      std::fill(rows + n, rows + kTile, own.rows[kTile]);
      if (floats) {
        if (columns >= 0) turn_columns(m, s, columns, 0, m.Kp, (uint32_t*)out);
        else p.kernels->transpose(rows, row_words(m), (uint32_t*)out);
        if (m.format == KTFX_FMT_F16) separate_halves(out, row_words(m));
      } else {
        for (int i = 0; i < kTile && block_scaled; ++i) {
          const float* of = i < n ? blocks.of(plain[i], G) : nullptr;
          for (int64_t g = 0; g < G; ++g) scale_in[g * kTile + i] = of ? of[g] : 0.0f;
        }
        const int64_t then = tile + (!block_scaled || first % stride + 1 < stride ? 1 : p.tiles_task - stride + 1);
        good &= pack_rounded(p, s, rows, n, columns, then, scale_in.data(), turned, out);
      }
    }
    const int64_t used = m.zero_offset + (m.format == KTFX_FMT_INT4ZP ? G * kTile : 0);
    memset(out + used, 0, m.tile_bytes - used);  // equal weights give equal bytes
  }
  return good;
}

void pack_task(void* context, int, int64_t task, int) {
  Packing& p = *(Packing*)context;
  const ktfx_matrix& m = *p.m;
  const int64_t expert = task / p.tasks_expert, first = task % p.tasks_expert * p.tiles_task;
  const int64_t last = std::min<int64_t>(first + p.tiles_task, m.tiles);
  const int64_t stride = p.tiles_task / kTilesTask;  // 2: gate's tiles and their blocks, then up's
  bool good = true;
  for (int64_t i = 0; i < stride; ++i) good &= pack_tiles(p, expert, first + i, last, stride);
  if (!good) p.bad.store(expert, std::memory_order_relaxed);
}

// Tiles back to rows, for the formats that do not round.
void restore_task(void* context, int, int64_t task, int) {
  const Packing& p = *(const Packing*)context;
  const ktfx_matrix& m = *p.m;
  const int64_t expert = task / p.tasks_expert, first = task % p.tasks_expert * p.tiles_task;
  const ktfx_source& target = p.sources[expert];
  const int e = m.format == KTFX_FMT_F32 ? 4 : 2;
  std::vector<char> row(m.Kp * e);
  for (int64_t tile = first; tile < std::min<int64_t>(first + p.tiles_task, m.tiles); ++tile) {
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
    // FP8's blocks of 128 rows: eight tiles, and beside them as many of up where gate and up alternate.
    p.tiles_task = m->format == KTFX_FMT_FP8 && m->paired ? 2 * kTilesTask : kTilesTask;
    p.tasks_expert = (m->tiles + p.tiles_task - 1) / p.tiles_task;
    std::shared_ptr<Pool> workers = pool();
    std::lock_guard<std::mutex> hold(workers->busy);
    workers->begin_call();
    int64_t tasks[kMaxShares] = {experts * p.tasks_expert};
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
    p.tiles_task = kTilesTask;
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
