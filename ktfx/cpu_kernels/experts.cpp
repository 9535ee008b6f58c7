// One routed-experts call from tokens to tokens.
//
// (token, choice) pairs are slots, sorted by expert. An expert's slots form row blocks, as many rows as the register
// tile takes, whose inputs lie the way the tile kernels read them. Three steps follow, each a set of tasks:
//   up    (chunk of rows, 64 columns of h): gate and up tiles, activation, h written as the down step reads it
//   down  few tokens: 16 to 128 outputs over all experts, summed in place, every weight read once
//         many: (chunk of rows, 128 outputs) into y, weighted
//   sum   many tokens only: the K rows of y that belong to a token
// Sums run in one order whatever thread does what, so results do not depend on the number of threads.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "dispatch.h"
#include "halves.h"
#include "pool.h"
#include "settings.h"

namespace ktfx {
namespace {

constexpr int kColumns = 64;         // columns of h a task
constexpr int kChunkRows = 96;       // rows a task
constexpr int kDownTiles = 8;        // tiles a task of the down step
constexpr int64_t kFusedTokens = 32; // up to here the down step sums in place
constexpr int kInputBlock = 512;     // inputs whose weights stay in the nearest cache while many rows pass over them
constexpr int kPanelFloats = 256 * kTile + 2 * kTile * kInputBlock / 32;  // a panel and its scales
constexpr int64_t kArenaBytes = 512ll << 20;

// Where the time of calls goes, for measurements: ktfx_profile.
struct Profile {
  std::atomic<bool> on{false};
  double sums[KTFX_PROFILE] = {};  // under the pool's lock
};
Profile& profile() {
  static Profile p;
  return p;
}
double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Memory of the running call, cut from one mapping with huge pages that the next call finds again.
class Arena {
 public:
  ~Arena() { release(); }
  bool reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    release();
    bytes = (bytes + (4 << 20) - 1) & ~((4ll << 20) - 1);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return false;
    madvise(p, bytes, MADV_HUGEPAGE);
    base_ = (char*)p;
    size_ = bytes;
    return true;
  }
  template <class T>
  T* take(int64_t n) {
    T* p = (T*)(base_ + used_);
    used_ += padded(n * (int64_t)sizeof(T));
    return p;
  }
  static int64_t padded(int64_t bytes) { return (bytes + 127) & ~127ll; }

 private:
  void release() {
    if (base_) munmap(base_, size_);
    base_ = nullptr;
    size_ = 0;
  }
  char* base_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

// Rows of one expert whose inputs, or h, lie interleaved.
struct Rows {
  void* q;      // the panel (bf16 rows for AMX)
  float* dx;    // activation scales and sums of the integer panels
  int32_t* sx;
};
struct RowBlock {
  int32_t slot, rows;
  bool amx;
  Rows x, h;
};
struct Chunk {
  int32_t expert, first, last;  // row blocks [first, last)
  int32_t slot, rows;
  bool amx;
};

struct Workspace {
  Arena arena;
  std::vector<int32_t> ids, offset, slot_of, place_of;  // place_of[t * K + k]: where that pair was sorted to
  std::vector<float> weights;
  std::vector<RowBlock> blocks;
  std::vector<Chunk> chunks;
};

// How inputs lie, and the block and bits of an integer panel's activations.
struct PanelKind {
  Panel panel;
  int block, bits;
  int element() const { return panel == kPanelF32 ? 4 : panel == kPanelI8 ? 1 : 2; }
  int64_t blocks(int64_t K) const { return (K + block - 1) / block; }
};

struct Run {
  const ktfx_layer* layer;
  const KernelTable* kernels;
  ktfx_call* call;
  Workspace* ws;
  Pool* pool;
  const char* x;   // of this part of the tokens
  char* out;
  int64_t T, S;
  int K;
  PanelKind x_kind, h_kind;
  bool any_amx, all_amx, fused;
  bool halves;             // AMX multiplies INT8 weights as stored, inputs as halves of int16
  char* token_q;           // [T] rows in the panel's format
  float* token_dx;
  int32_t* token_sx;
  uint8_t* token_halves;   // [T][2 (Kp + kAmxPad)], and a scale each
  float* token_scales;
  float* y;                // [S][Hp], or [T][Hp] when fused
  float* scratch;          // [threads][scratch_floats]
  int64_t scratch_floats;
  int up_columns;          // columns of h a task of the up step: kColumns, or a part of it
  int down_tiles;          // tiles a task of the down step
};

int dtype_bytes(int dtype) { return dtype == KTFX_F32 ? 4 : 2; }

// int8 is for the inputs of the up step only: rounding h too, whose peaks are higher, would add more than 1 %.
void choose_panels(Run& r) {
  const ktfx_layer& l = *r.layer;
  if (l.up.format <= KTFX_FMT_FP8) {
    r.x_kind = r.h_kind = {kPanelF32, 1 << 30, 32};
    return;
  }
  r.x_kind = r.h_kind = {kPanelI16, l.up.group == 32 ? 32 : kBlock16, 16};
  if (l.up.format >= KTFX_FMT_INT4 && l.int8_activations) r.x_kind = {kPanelI8, kBlock8, 8};
}

// ahead: null where the kernel fetches its own weights.
TileFn tile_kernel(const Run& r, const ktfx_matrix& m, Panel panel, int rows, const Ahead* ahead) {
  if (panel == kPanelF32) return (ahead && m.format <= KTFX_FMT_BF16 ? r.kernels->f32_near : r.kernels->f32)[m.format][rows];
  const int s = m.scale_dtype == KTFX_BF16 ? 1 : m.scale_dtype == KTFX_F16 ? 2 : 0;
  return panel == kPanelI16 ? r.kernels->i16[m.format - KTFX_FMT_INT8][s][rows]
                            : r.kernels->i8[m.format - KTFX_FMT_INT8][s][rows];
}

// One row block over inputs [k, end) of a tile, or of the panel that it was unpacked to.
void multiply_rows(const Run& r, const ktfx_matrix& m, const PanelKind& kind, const uint8_t* tile, const float* panel,
                   const uint8_t* next, const Ahead* ahead, const RowBlock& b, const Rows& in, int k, int end, float* c) {
  const KernelTable& kt = *r.kernels;
  if (!panel) {
    const TileArgs a{tile, &m, in.q, in.dx, in.sx, c, k, end, kind.block, k == 0, next, ahead_bytes(m.format),
                     ahead ? *ahead : Ahead{}};
    tile_kernel(r, m, kind.panel, b.rows, ahead)(&a);
  } else if (kind.panel == kPanelF32) {
    const float* x = (const float*)in.q + (int64_t)k * b.rows;  // the panel begins at input 0
    const TileArgs a{(const uint8_t*)panel, nullptr, x, nullptr, nullptr, c, 0, end - k, kind.block, k == 0, nullptr, 0,
                     *ahead};
    kt.f32_near[KTFX_FMT_F32][b.rows](&a);
  } else {
    const PanelArgs a{panel, panel + 256 * kTile, in.q, in.dx, in.sx, c, k, end, kind.block, k == 0, *ahead};
    (kind.panel == kPanelI16 ? kt.panel_i16 : kt.panel_i8[m.format == KTFX_FMT_MXFP4])[b.rows](&a);
  }
}

// c[tile][rows of the chunk][16] for `tiles` tiles from `w` on. after: what this thread most likely reads next.
void multiply(const Run& r, const ktfx_matrix& m, const uint8_t* w, int tiles, const uint8_t* after, const Chunk& chunk,
              bool down, float* c, float* scratch) {
  const KernelTable& kt = *r.kernels;
  const RowBlock* blocks = r.ws->blocks.data();
  if (chunk.amx) {
    const RowBlock& b = blocks[chunk.first];
    const Rows& in = down ? b.h : b.x;
    multiply_amx(kt, m, r.halves, w, tiles, after, in.q, in.dx, chunk.rows, c, scratch);
    return;
  }
  const PanelKind& kind = down ? r.h_kind : r.x_kind;
  const int parts = chunk.last - chunk.first;
  const bool unpack = takes_panel(kt, m.format, chunk.rows), tile_whole = takes_tiles(kt, m.format, chunk.rows);
  // A panel holds kInputBlock inputs of two bytes, or half as many floats, however few row blocks share it.
  const int panel_step = kind.panel == kPanelF32 ? kInputBlock / 2 : kInputBlock;
  const int step = unpack ? panel_step : parts > 1 && !tile_whole ? kInputBlock : m.Kp;
  const int64_t bits = input_bits(m.format) * kTile;
  for (int k = 0; k < m.Kp; k += step)
    for (int t = 0; t < tiles; ++t) {
      const int end = std::min(k + step, m.Kp);
      const uint8_t* tile = w + t * m.tile_bytes;
      // Next: the next tile's inputs, else the first tile's next ones, else what the next task reads.
      const bool last_tile = t + 1 == tiles, last = last_tile && end == m.Kp;
      const uint8_t* next = last ? after : last_tile ? w : tile + m.tile_bytes;
      const int from = last ? 0 : last_tile ? end : k;
      const int64_t bytes = std::min(step, m.Kp - from) * bits / 8;
      if (unpack) {
        if (kind.panel == kPanelF32) kt.unpack_f32(&m, tile, k, end, scratch);
        else
          (kind.panel == kPanelI16 ? kt.unpack_i16 : kt.unpack_i8)(&m, tile, k, end, kind.block, scratch,
                                                                   scratch + 256 * kTile);
      }
      float* to = c + (int64_t)t * chunk.rows * kTile;
      for (int i = chunk.first; i < chunk.last; ++i) {
        const Ahead ahead = share_ahead(next + from * bits / 8, bytes, i - chunk.first, parts, end - k);
        multiply_rows(r, m, kind, tile, unpack ? scratch : nullptr, last_tile ? after : tile + m.tile_bytes,
                      unpack || parts > 1 ? &ahead : nullptr, blocks[i], down ? blocks[i].h : blocks[i].x, k, end, to);
        to += blocks[i].rows * kTile;
      }
    }
}

const float* output_scales(const ktfx_matrix& m, const uint8_t* tile) {
  return m.format == KTFX_FMT_INT8 ? (const float*)(tile + m.scale_offset) : nullptr;
}

// Sixteen biases from `from` on, zeros past the end; null where the layer has none.
const float* sixteen(const float* bias, int64_t from, int64_t end, float* buffer) {
  if (!bias) return nullptr;
  if (from + kTile <= end) return bias + from;
  for (int i = 0; i < kTile; ++i) buffer[i] = from + i < end ? bias[from + i] : 0.0f;
  return buffer;
}

// ---------------------------------------------------------------------------------------------------------------------

void halve_tokens_task(void* context, int, int64_t task, int) {
  Run& r = *(Run*)context;
  const ktfx_layer& l = *r.layer;
  const int64_t row = halves_row_bytes(l.up), dtype = r.call->x_dtype;
  for (int64_t t = task * 8; t < std::min(task * 8 + 8, r.T); ++t)
    r.token_scales[t] = halve_row(*r.kernels, r.x + t * l.hidden * dtype_bytes(dtype), dtype, l.hidden, l.up.Kp,
                                  r.token_halves + t * row);
}

// h, which the up step left in bf16, to halves where it lies.
void halve_h_task(void* context, int, int64_t task, int worker) {
  Run& r = *(Run*)context;
  const RowBlock& b = r.ws->blocks[task];
  if (!b.amx) return;
  const int64_t Kp = r.layer->down.Kp, row = halves_row_bytes(r.layer->down);
  uint8_t* halves = (uint8_t*)(r.scratch + worker * r.scratch_floats);
  for (int i = 0; i < b.rows; ++i) {
    uint8_t* h = (uint8_t*)b.h.q + i * row;
    b.h.dx[i] = halve_row(*r.kernels, h, KTFX_BF16, Kp, Kp, halves);
    memcpy(h, halves, 2 * Kp);
  }
}

void token_task(void* context, int, int64_t task, int) {
  Run& r = *(Run*)context;
  const ktfx_layer& l = *r.layer;
  const PanelKind& kind = r.x_kind;
  const int64_t Kp = l.up.Kp, nb = kind.blocks(Kp), bytes = Kp * kind.element();
  float row[16384 / 4];
  for (int64_t t = task * 8; t < std::min(task * 8 + 8, r.T); ++t) {
    const char* x = r.x + t * l.hidden * dtype_bytes(r.call->x_dtype);
    char* q = r.token_q + t * bytes;
    if (kind.panel == kPanelF32) {
      r.kernels->to_f32(x, r.call->x_dtype, (float*)q, l.hidden, input_factor(l.up.format));
      std::fill((float*)q + l.hidden, (float*)q + Kp, 0.0f);
      continue;
    }
    for (int64_t k = 0; k < Kp; k += 4096) {  // 4096 is a multiple of every block
      const int64_t n = std::min<int64_t>(4096, Kp - k), real = std::max<int64_t>(0, std::min(n, l.hidden - k));
      r.kernels->to_f32(x + k * dtype_bytes(r.call->x_dtype), r.call->x_dtype, row, real, 1.0f);
      std::fill(row + real, row + n, 0.0f);
      r.kernels->quantize(row, n, kind.block, kind.bits, q + k * kind.element(), 4 * kind.element(),
                          r.token_dx + t * nb + k / kind.block, r.token_sx + t * nb + k / kind.block, 1);
    }
  }
}

void gather_task(void* context, int, int64_t task, int) {
  Run& r = *(Run*)context;
  const ktfx_layer& l = *r.layer;
  const int64_t Kp = l.up.Kp, nb = r.x_kind.blocks(Kp);
  const RowBlock& b = r.ws->blocks[task];
  const int32_t* slots = r.ws->slot_of.data() + b.slot;
  if (b.amx && r.halves) {
    const int64_t row = halves_row_bytes(l.up);
    for (int i = 0; i < b.rows; ++i) {
      const int64_t t = slots[i] / r.K;
      memcpy((uint8_t*)b.x.q + i * row, r.token_halves + t * row, 2 * Kp);
      b.x.dx[i] = r.token_scales[t];
    }
    return;
  }
  if (b.amx) {
    for (int i = 0; i < b.rows; ++i) {
      uint16_t* to = (uint16_t*)b.x.q + i * (Kp + kAmxPad);
      memcpy(to, r.x + (int64_t)(slots[i] / r.K) * l.hidden * 2, l.hidden * 2);
      memset(to + l.hidden, 0, (Kp - l.hidden) * 2);
    }
    return;
  }
  if (b.rows == 1) return;  // it reads the token's own row
  if (r.x_kind.panel == kPanelF32) {
    const float* rows[kMaxRows];
    for (int i = 0; i < b.rows; ++i) rows[i] = (const float*)r.token_q + (slots[i] / r.K) * Kp;
    r.kernels->interleave(rows, b.rows, Kp, (float*)b.x.q);
    return;
  }
  for (int i = 0; i < b.rows; ++i) {
    const int64_t t = slots[i] / r.K;
    if (r.x_kind.panel == kPanelI16) {
      const uint64_t* from = (const uint64_t*)r.token_q + t * Kp / 4;
      uint64_t* to = (uint64_t*)b.x.q + i;
      for (int64_t k = 0; k < Kp / 4; ++k) to[k * b.rows] = from[k];
    } else {
      const uint32_t* from = (const uint32_t*)r.token_q + t * Kp / 4;
      uint32_t* to = (uint32_t*)b.x.q + i;
      for (int64_t k = 0; k < Kp / 4; ++k) to[k * b.rows] = from[k];
    }
    for (int64_t j = 0; j < nb; ++j) {
      b.x.dx[j * b.rows + i] = r.token_dx[t * nb + j];
      b.x.sx[j * b.rows + i] = r.token_sx[t * nb + j];
    }
  }
}

const uint8_t* up_tiles(const ktfx_layer& l, int expert, int64_t h_tile) {
  return l.up_weights + ((int64_t)expert * l.up.tiles + h_tile * (l.up.paired + 1)) * l.up.tile_bytes;
}
const uint8_t* down_tiles(const ktfx_layer& l, int expert, int64_t tile) {
  return l.down_weights + ((int64_t)expert * l.down.tiles + tile) * l.down.tile_bytes;
}

void up_task(void* context, int share, int64_t task, int worker) {
  Run& r = *(Run*)context;
  const ktfx_layer& l = *r.layer;
  const KernelTable& kt = *r.kernels;
  const int paired = l.up.paired + 1;
  const int64_t groups = (l.down.Kp + kColumns - 1) / kColumns;
  const int64_t begin = share_begin(groups, share, r.pool->shares()), end = share_begin(groups, share + 1, r.pool->shares());
  const int64_t parts = kColumns / r.up_columns, part = task % ((end - begin) * parts);
  const int64_t number = task / ((end - begin) * parts);
  const Chunk& chunk = r.ws->chunks[number];
  const int64_t column = (begin + part / parts) * kColumns + part % parts * r.up_columns;
  if (column >= l.down.Kp) return;
  const int tile = (int)(column / kTile), columns = (int)std::min<int64_t>(r.up_columns, l.down.Kp - column);
  const int h_tiles = l.up.tiles / paired, count = std::max(0, std::min(columns / kTile, h_tiles - tile));
  float* c = r.scratch + worker * r.scratch_floats;
  float* tail = c + (int64_t)kColumns / kTile * 2 * kChunkRows * kTile;
  const uint8_t* w = up_tiles(l, chunk.expert, tile);
  const uint8_t* after = w + (int64_t)count * paired * l.up.tile_bytes;
  if (part + 1 == (end - begin) * parts && number + 1 < (int64_t)r.ws->chunks.size())
    after = up_tiles(l, r.ws->chunks[number + 1].expert, begin * kColumns / kTile);
  if (chunk.amx) kt.amx_begin();
  if (count) multiply(r, l.up, w, count * paired, after, chunk, false, c, tail);
  if (chunk.amx) kt.amx_end();
  const int64_t I = l.intermediate;
  const float* bias = l.up_bias ? l.up_bias + chunk.expert * I * paired : nullptr;
  const float factor = input_factor(l.down.format);
  float h[kColumns];
  int row = 0;
  for (int i = chunk.first; i < chunk.last; ++i) {
    const RowBlock& b = r.ws->blocks[i];
    for (int j = 0; j < b.rows; ++j, ++row) {
      std::fill(h, h + kColumns, 0.0f);
      for (int t = 0; t < count; ++t) {
        const float* gate = c + ((int64_t)t * paired * chunk.rows + row) * kTile;
        const float* up = paired == 2 ? gate + (int64_t)chunk.rows * kTile : gate;
        const uint8_t* at = w + (int64_t)t * paired * l.up.tile_bytes;
        float bg[kTile], bu[kTile];
        const int64_t n = column + t * kTile;
        kt.activate(&l, gate, up, output_scales(l.up, at), output_scales(l.up, at + (paired - 1) * l.up.tile_bytes),
                    paired == 2 ? sixteen(bias, n, I, bg) : nullptr,
                    sixteen(paired == 2 && bias ? bias + I : bias, n, I, bu), h + t * kTile);
        if (n + kTile > I) std::fill(h + (I - column), h + (t + 1) * kTile, 0.0f);
      }
      if (chunk.amx) {
        kt.from_f32(h, (uint16_t*)b.h.q + j * (int64_t)(l.down.Kp + kAmxPad) + column, KTFX_BF16, columns);
      } else if (r.h_kind.panel == kPanelF32) {
        float* to = (float*)b.h.q + column * b.rows + j;
        for (int n = 0; n < columns; ++n) to[(int64_t)n * b.rows] = h[n] * factor;
      } else {
        const int e = r.h_kind.element();
        const int64_t at = column / r.h_kind.block * b.rows + j;
        kt.quantize(h, columns, r.h_kind.block, r.h_kind.bits, (char*)b.h.q + (column * b.rows + 4 * j) * e, 4ll * b.rows * e,
                    b.h.dx + at, b.h.sx + at, b.rows);
      }
    }
  }
}

// The outputs of `tiles` tiles from `tile` on, for one chunk, weighted and added to out(row) + 16 tile.
template <class Out>
void down_chunk(const Run& r, const Chunk& chunk, const uint8_t* after, int tile, int tiles, int worker, Out out) {
  const ktfx_layer& l = *r.layer;
  float* c = r.scratch + worker * r.scratch_floats;
  float* tail = c + (int64_t)kDownTiles * kChunkRows * kTile;
  const uint8_t* w = down_tiles(l, chunk.expert, tile);
  if (chunk.amx) r.kernels->amx_begin();
  multiply(r, l.down, w, tiles, after, chunk, true, c, tail);
  if (chunk.amx) r.kernels->amx_end();
  const float* bias = l.down_bias ? l.down_bias + (int64_t)chunk.expert * l.hidden : nullptr;
  for (int row = 0; row < chunk.rows; ++row) {
    const int32_t slot = r.ws->slot_of[chunk.slot + row];
    float* to = out(slot, chunk.slot + row);
    for (int t = 0; t < tiles; ++t) {
      float buffer[kTile];
      r.kernels->axpy(to + (tile + t) * kTile, c + ((int64_t)t * chunk.rows + row) * kTile,
                      output_scales(l.down, w + t * l.down.tile_bytes),
                      sixteen(bias, (int64_t)(tile + t) * kTile, l.hidden, buffer), r.ws->weights[slot], kTile);
    }
  }
}

void down_fused_task(void* context, int share, int64_t task, int worker) {
  Run& r = *(Run*)context;
  const ktfx_layer& l = *r.layer;
  const int shares = r.pool->shares(), Hp = l.down.tiles * kTile;
  const int64_t begin = share_begin(l.down.tiles, share, shares), end = share_begin(l.down.tiles, share + 1, shares);
  const int tile = (int)(begin + task * r.down_tiles), tiles = (int)std::min<int64_t>(r.down_tiles, end - tile);
  for (int64_t t = 0; t < r.T; ++t) memset(r.y + t * Hp + tile * kTile, 0, tiles * kTile * 4);
  const std::vector<Chunk>& chunks = r.ws->chunks;
  for (size_t i = 0; i < chunks.size(); ++i) {
    // The same tiles of the next expert come after these, then the next tiles of the first.
    const bool last = i + 1 == chunks.size();
    const uint8_t* after = down_tiles(l, chunks[last ? 0 : i + 1].expert, last ? tile + tiles : tile);
    down_chunk(r, chunks[i], after, tile, tiles, worker,
               [&](int32_t slot, int64_t) { return r.y + (int64_t)(slot / r.K) * Hp; });
  }
  // These outputs are whole now.
  const int bytes = dtype_bytes(r.call->x_dtype);
  const int64_t first = (int64_t)tile * kTile, columns = std::min<int64_t>(tiles * kTile, l.hidden - first);
  for (int64_t t = 0; t < r.T; ++t)
    r.kernels->from_f32(r.y + t * Hp + first, r.out + (t * l.hidden + first) * bytes, r.call->x_dtype, columns);
}

void down_task(void* context, int share, int64_t task, int worker) {
  Run& r = *(Run*)context;
  const ktfx_layer& l = *r.layer;
  const int shares = r.pool->shares(), Hp = l.down.tiles * kTile;
  const int64_t begin = share_begin(l.down.tiles, share, shares), end = share_begin(l.down.tiles, share + 1, shares);
  const int64_t groups = (end - begin + r.down_tiles - 1) / r.down_tiles;
  const Chunk& chunk = r.ws->chunks[task / groups];
  const int tile = (int)(begin + task % groups * r.down_tiles);
  const int tiles = (int)std::min<int64_t>(r.down_tiles, end - tile);
  const uint8_t* after = down_tiles(l, chunk.expert, tile + tiles);
  if (tile + tiles == end && task / groups + 1 < (int64_t)r.ws->chunks.size())
    after = down_tiles(l, r.ws->chunks[task / groups + 1].expert, begin);
  for (int i = 0; i < chunk.rows; ++i)
    memset(r.y + (int64_t)(chunk.slot + i) * Hp + tile * kTile, 0, tiles * kTile * 4);
  down_chunk(r, chunk, after, tile, tiles, worker, [&](int32_t, int64_t place) { return r.y + place * Hp; });
}

void sum_task(void* context, int, int64_t task, int worker) {
  Run& r = *(Run*)context;
  const ktfx_layer& l = *r.layer;
  const int Hp = l.down.tiles * kTile;
  float* total = r.scratch + worker * r.scratch_floats;
  for (int64_t t = task * 4; t < std::min(task * 4 + 4, r.T); ++t) {
    memset(total, 0, Hp * 4);
    for (int k = 0; k < r.K; ++k)
      r.kernels->axpy(total, r.y + (int64_t)r.ws->place_of[t * r.K + k] * Hp, nullptr, nullptr, 1.0f, Hp);
    r.kernels->from_f32(total, r.out + t * l.hidden * dtype_bytes(r.call->x_dtype), r.call->x_dtype, l.hidden);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// Tasks that no weight is read in: split among the shares by number alone.
void run_plain(Run& r, int64_t n, TaskFn fn) {
  struct Plain {
    void* run;
    TaskFn fn;
    int64_t n;
    int shares;
  } plain{&r, fn, n, r.pool->shares()};
  int64_t tasks[kMaxShares];
  for (int s = 0; s < plain.shares; ++s) tasks[s] = share_begin(n, s + 1, plain.shares) - share_begin(n, s, plain.shares);
  r.pool->run(
      tasks,
      [](void* p, int share, int64_t task, int worker) {
        Plain& q = *(Plain*)p;
        q.fn(q.run, share, share_begin(q.n, share, q.shares) + task, worker);
      },
      &plain);
}

void sort_slots(Run& r) {
  const ktfx_layer& l = *r.layer;
  Workspace& ws = *r.ws;
  const int64_t S = r.S;
  ws.offset.assign(l.num_experts + 1, 0);
  ws.slot_of.resize(S);
  ws.place_of.resize(S);
  for (int64_t s = 0; s < S; ++s) ++ws.offset[ws.ids[s] + 1];
  for (int e = 0; e < l.num_experts; ++e) ws.offset[e + 1] += ws.offset[e];
  for (int64_t s = 0; s < S; ++s) {
    const int32_t place = ws.offset[ws.ids[s]]++;
    ws.slot_of[place] = (int32_t)s;
    ws.place_of[s] = place;
  }
  // offset[e] is now the end of expert e.
  ws.blocks.clear();
  ws.chunks.clear();
  r.any_amx = false;
  r.all_amx = true;
  int32_t begin = 0;
  for (int e = 0; e < l.num_experts; begin = ws.offset[e], ++e) {
    const int32_t m = ws.offset[e] - begin;
    if (!m) continue;
    const bool amx = takes_amx(*r.kernels, r.call->x_dtype, l.up.format, m);
    r.any_amx |= amx;
    r.all_amx &= amx;
    const int32_t chunks = (m + kChunkRows - 1) / kChunkRows;
    int32_t done = 0;
    for (int32_t i = 0; i < chunks; ++i) {
      // AMX wants whole multiples of 32 rows, the register tiles want equal chunks.
      const int32_t rows = amx ? std::min(kChunkRows, m - done) : m / chunks + (i < m % chunks);
      Chunk c{e, (int32_t)ws.blocks.size(), 0, begin + done, rows, amx};
      const int32_t most = block_rows(*r.kernels, l.up.format, rows), n = amx ? 1 : (rows + most - 1) / most;
      int32_t slot = c.slot;
      for (int32_t j = 0; j < n; ++j) {
        const int32_t size = rows / n + (j < rows % n);
        ws.blocks.push_back({slot, size, amx, {}, {}});
        slot += size;
      }
      c.last = (int32_t)ws.blocks.size();
      ws.chunks.push_back(c);
      done += rows;
    }
  }
}

bool lay_out(Run& r) {
  const ktfx_layer& l = *r.layer;
  Workspace& ws = *r.ws;
  const int64_t Ku = l.up.Kp, Kd = l.down.Kp, nbu = r.x_kind.blocks(Ku), nbd = r.h_kind.blocks(Kd);
  const int64_t Hp = (int64_t)l.down.tiles * kTile, e = r.x_kind.element(), eh = r.h_kind.element();
  const bool integer = r.x_kind.panel != kPanelF32;
  r.fused = r.T <= kFusedTokens;
  const int64_t tail_floats = std::max<int64_t>(kPanelFloats, r.any_amx ? std::max(Ku, Kd) * kTile : 0);
  r.scratch_floats = std::max<int64_t>((int64_t)kDownTiles * kChunkRows * kTile + tail_floats, Hp) + 64;
  const int64_t y_rows = r.fused ? r.T : r.S;
  // Every block's panels, padded, plus the tokens' rows; 1 KiB a block covers the padding.
  const int64_t halves_row = r.halves ? halves_row_bytes(l.up) : 0;
  const int64_t bytes = r.T * (Ku * e + nbu * 8 + halves_row + 520) + r.S * ((Ku + Kd + 2 * kAmxPad) * std::max<int64_t>({e, eh, 2}) + (nbu + nbd) * 8) +
                        (int64_t)ws.blocks.size() * 1024 + y_rows * Hp * 4 +
                        r.pool->threads() * (r.scratch_floats * 4 + 256) + 8192;
  if (!ws.arena.reserve(bytes)) return false;
  r.token_halves = ws.arena.take<uint8_t>(r.T * halves_row);
  r.token_scales = ws.arena.take<float>(r.T);
  r.token_q = ws.arena.take<char>(r.T * Ku * e);
  if (integer) {
    r.token_dx = ws.arena.take<float>(r.T * nbu);
    r.token_sx = ws.arena.take<int32_t>(r.T * nbu);
  }
  for (const Chunk& chunk : ws.chunks)
    for (int i = chunk.first; i < chunk.last; ++i) {
      RowBlock& b = ws.blocks[i];
      if (chunk.amx) {
        b.x.q = ws.arena.take<uint16_t>(b.rows * (Ku + kAmxPad));
        b.h.q = ws.arena.take<uint16_t>(b.rows * (Kd + kAmxPad));
        if (r.halves) {
          b.x.dx = ws.arena.take<float>(b.rows);
          b.h.dx = ws.arena.take<float>(b.rows);
        }
        continue;
      }
      b.h.q = ws.arena.take<char>(b.rows * Kd * eh);
      if (integer) {
        b.h.dx = ws.arena.take<float>(b.rows * nbd);
        b.h.sx = ws.arena.take<int32_t>(b.rows * nbd);
      }
      const int64_t t = ws.slot_of[b.slot] / r.K;
      if (b.rows == 1) {
        b.x.q = r.token_q + t * Ku * e;
        if (integer) {
          b.x.dx = r.token_dx + t * nbu;
          b.x.sx = r.token_sx + t * nbu;
        }
        continue;
      }
      b.x.q = ws.arena.take<char>(b.rows * Ku * e);
      if (integer) {
        b.x.dx = ws.arena.take<float>(b.rows * nbu);
        b.x.sx = ws.arena.take<int32_t>(b.rows * nbu);
      }
    }
  r.y = ws.arena.take<float>(y_rows * Hp);
  r.scratch = ws.arena.take<float>(r.pool->threads() * r.scratch_floats);
  return true;
}

// Adds the time since `since` to a phase and returns now; for a step on all threads also how late they began and how
// long they waited for the last one, as means over the threads.
double note_phase(Run& r, double since, int phase, Pool::Times* times = nullptr) {
  if (!since) return 0;
  const double now = seconds_now();
  double* sums = profile().sums;
  sums[phase] += now - since;
  if (times) {
    const int n = r.pool->threads();
    for (int w = 0; w < n; ++w) {
      const bool took = times->begin[w] > 0;
      sums[phase + 1] += (took ? times->begin[w] - since : 0) / n;
      sums[phase + 2] += (took ? now - times->end[w] : 0) / n;
      sums[phase + 3] += (took ? 0.0 : 1.0) / n;
    }
  }
  return now;
}

// Threads that are done with the up step fetch what they will read first in the down step.
void read_ahead_of_down(Run& r, const int64_t* tasks) {
  const ktfx_layer& l = *r.layer;
  const int shares = r.pool->shares();
  for (int w = 0; w < r.pool->threads(); ++w) {
    int share;
    int64_t task;
    if (!r.pool->first_task(w, tasks, &share, &task)) continue;
    const int64_t begin = share_begin(l.down.tiles, share, shares), end = share_begin(l.down.tiles, share + 1, shares);
    const int64_t groups = (end - begin + r.down_tiles - 1) / r.down_tiles;
    const int64_t tile = begin + task % groups * r.down_tiles;
    const int64_t bytes = std::min<int64_t>(r.down_tiles, end - tile) * l.down.tile_bytes;
    Reading& reading = r.pool->then_reads(w);
    for (size_t i = r.fused ? 0 : task / groups; i < r.ws->chunks.size() && !reading.full(); ++i)
      reading.add(down_tiles(l, r.ws->chunks[i].expert, tile), bytes);
  }
}

int32_t run_part(Run& r) {
  const ktfx_layer& l = *r.layer;
  const int shares = r.pool->shares();
  double since = profile().on ? seconds_now() : 0;
  Pool::Times times;
  auto watch = [&] {
    if (!since) return;
    times.begin.assign(r.pool->threads(), 0.0);
    times.end.assign(r.pool->threads(), 0.0);
    r.pool->note_times(&times);
  };
  sort_slots(r);
  r.halves = r.any_amx && halves_serve(l.up) && halves_serve(l.down);
  if (!lay_out(r)) return KTFX_NO_MEMORY;
  const int64_t token_tasks = (r.T + 7) / 8;
  if (!r.all_amx) {
    if (r.T <= 8)
      token_task(&r, 0, 0, 0);
    else
      run_plain(r, token_tasks, token_task);
  }
  if (r.halves) run_plain(r, token_tasks, halve_tokens_task);
  if (r.ws->blocks.size() < (size_t)r.S || r.any_amx) run_plain(r, (int64_t)r.ws->blocks.size(), gather_task);

  since = note_phase(r, since, 1);
  int64_t tasks[kMaxShares];
  const int64_t columns = (l.down.Kp + kColumns - 1) / kColumns, chunks = (int64_t)r.ws->chunks.size();
  // One token's tasks are few: smaller ones keep a late thread from being waited for. A block of quantised h stays whole.
  r.up_columns = kColumns;
  const int least = r.h_kind.panel == kPanelF32 ? kTile : r.h_kind.block;
  while (r.up_columns / 2 >= least && chunks * columns * kColumns < 16ll * r.pool->threads() * r.up_columns)
    r.up_columns /= 2;
  for (int s = 0; s < shares; ++s)
    tasks[s] = chunks * (kColumns / r.up_columns) * (share_begin(columns, s + 1, shares) - share_begin(columns, s, shares));
  // Fused tasks are long: at least eight a thread, as far as there are tiles.
  r.down_tiles = r.fused ? std::max(1, std::min(kDownTiles, l.down.tiles / (8 * r.pool->threads()))) : kDownTiles;
  int64_t later[kMaxShares];
  for (int s = 0; s < shares; ++s) {
    const int64_t n = share_begin(l.down.tiles, s + 1, shares) - share_begin(l.down.tiles, s, shares);
    later[s] = (n + r.down_tiles - 1) / r.down_tiles * (r.fused ? 1 : chunks);
  }
  if (r.pool->threads() > 1) read_ahead_of_down(r, later);
  watch();
  r.pool->run(tasks, up_task, &r);
  since = note_phase(r, since, 2, &times);
  if (r.halves) run_plain(r, (int64_t)r.ws->blocks.size(), halve_h_task);

  watch();
  r.pool->run(later, r.fused ? down_fused_task : down_task, &r);
  since = note_phase(r, since, 6, &times);
  if (since) r.pool->note_times(nullptr);

  if (!r.fused) run_plain(r, (r.T + 3) / 4, sum_task);
  if (since) {
    note_phase(r, since, 10);
    profile().sums[0] += 1;
  }
  return KTFX_OK;
}

thread_local char last_message[KTFX_MESSAGE];

int32_t fail(ktfx_call* call, int32_t status, const char* text) {
  snprintf(call->message, sizeof call->message, "%s", text);
  return call->status = status;
}

bool read_ids(ktfx_call* call, int64_t begin, int64_t n, std::vector<int32_t>& ids) {
  ids.resize(n);
  for (int64_t s = 0; s < n; ++s) {
    const int64_t id = call->id_dtype == KTFX_I64 ? ((const int64_t*)call->ids)[begin + s]
                                                  : ((const int32_t*)call->ids)[begin + s];
    if (id < 0 || id >= call->layer->num_experts) {
      snprintf(call->message, sizeof call->message, "expert id %lld of token %lld is outside [0, %d)", (long long)id,
               (long long)((begin + s) / call->chosen), call->layer->num_experts);
      return false;
    }
    ids[s] = (int32_t)id;
  }
  return true;
}

int32_t run_call(ktfx_call* call) {
  const ktfx_layer* l = call->layer;
  if (call->tokens == 0) return call->status = KTFX_OK;
  if (!l || !call->x || !call->out || !call->ids || !call->weights || call->chosen < 0 || call->tokens < 0 ||
      !l->up_weights || !l->down_weights)
    return fail(call, KTFX_BAD_ARGUMENT, "a pointer of the call is null, or a size is negative");
  if (call->x_dtype < 0 || call->x_dtype > KTFX_F16 || call->weight_dtype < 0 || call->weight_dtype > KTFX_F16 ||
      (call->id_dtype != KTFX_I32 && call->id_dtype != KTFX_I64))
    return fail(call, KTFX_BAD_ARGUMENT, "a dtype of the call is not one that the kernels take");
  call->message[0] = 0;
  std::shared_ptr<Pool> p = pool();
  std::lock_guard<std::mutex> hold(p->busy);
  p->begin_call();
  if (!p->workspace) p->workspace = std::make_shared<Workspace>();
  Run r = {};
  r.layer = l;
  r.kernels = &kernels();
  r.call = call;
  r.ws = (Workspace*)p->workspace.get();
  r.pool = p.get();
  r.K = call->chosen;
  choose_panels(r);
  // All ids are checked before any work, so that a bad one leaves the output alone.
  if (!read_ids(call, 0, call->tokens * r.K, r.ws->ids)) return call->status = KTFX_BAD_ID;
  std::vector<int32_t> ids;
  ids.swap(r.ws->ids);
  const int64_t per_token = (int64_t)std::max(1, r.K) * (l->up.Kp + l->down.Kp + l->hidden) * 4;
  const int64_t part = std::max<int64_t>(kFusedTokens + 1, kArenaBytes / per_token);
  for (int64_t begin = 0; begin < call->tokens; begin += part) {
    r.T = std::min(part, call->tokens - begin);
    r.S = r.T * r.K;
    r.x = (const char*)call->x + begin * l->hidden * dtype_bytes(call->x_dtype);
    r.out = (char*)call->out + begin * l->hidden * dtype_bytes(call->x_dtype);
    r.ws->ids.assign(ids.begin() + begin * r.K, ids.begin() + begin * r.K + r.S);
    r.ws->weights.resize(r.S);
    r.kernels->to_f32((const char*)call->weights + begin * r.K * dtype_bytes(call->weight_dtype), call->weight_dtype,
                      r.ws->weights.data(), r.S, 1.0f);
    const int32_t status = run_part(r);
    if (status != KTFX_OK) return fail(call, status, "no memory for the call's activations");
  }
  r.ws->ids.swap(ids);
  return call->status = KTFX_OK;
}

}  // namespace
}  // namespace ktfx

extern "C" {

int32_t ktfx_experts(ktfx_call* call) {
  if (!call) return KTFX_BAD_ARGUMENT;
  try {
    return ktfx::run_call(call);
  } catch (const std::bad_alloc&) {
    return ktfx::fail(call, KTFX_NO_MEMORY, "no memory for the call's bookkeeping");
  } catch (const std::exception& e) {
    return ktfx::fail(call, KTFX_BAD_ARGUMENT, e.what());
  }
}

int32_t ktfx_experts_now(const ktfx_layer* layer, const void* x, const void* ids, const void* weights, void* out,
                         int64_t tokens, int32_t chosen, int32_t dtypes) {
  ktfx_call call;
  call.layer = layer;
  call.x = x;
  call.ids = ids;
  call.weights = weights;
  call.out = out;
  call.tokens = tokens;
  call.chosen = chosen;
  call.x_dtype = dtypes & 255;
  call.id_dtype = dtypes >> 8 & 255;
  call.weight_dtype = dtypes >> 16 & 255;
  call.message[0] = 0;
  const int32_t status = ktfx_experts(&call);
  if (status != KTFX_OK) memcpy(ktfx::last_message, call.message, sizeof ktfx::last_message);
  return status;
}

const char* ktfx_last_message(void) { return ktfx::last_message; }

void ktfx_wake(void) {
  try {
    ktfx::pool()->wake();
  } catch (const std::exception&) {  // no threads yet; the call will say so
  }
}

int32_t ktfx_amx_rows(void) { return ktfx::amx_setting().value; }
void ktfx_set_amx_rows(int32_t rows) { ktfx::amx_setting().value = rows > 0 ? rows : 0; }
void ktfx_profile(int32_t on, double* sums) {
  std::shared_ptr<ktfx::Pool> p = ktfx::pool();
  std::lock_guard<std::mutex> hold(p->busy);
  ktfx::Profile& all = ktfx::profile();
  if (sums) memcpy(sums, all.sums, sizeof all.sums);
  memset(all.sums, 0, sizeof all.sums);
  all.on = on != 0;
}

int32_t ktfx_ahead(void) { return ktfx::ahead_setting().value; }
void ktfx_set_ahead(int32_t bytes) { ktfx::ahead_setting().value = bytes > 0 ? bytes : 0; }
int32_t ktfx_threads(void) { return ktfx::pool()->threads(); }
int32_t ktfx_shares(void) { return ktfx::pool()->shares(); }

int32_t ktfx_set_threads(int32_t threads, int32_t shares) {
  if (threads < 0 || shares < 0) return KTFX_BAD_ARGUMENT;
  try {
    ktfx::resize_pool(threads, shares);
  } catch (const std::exception&) {
    return KTFX_NO_MEMORY;
  }
  return KTFX_OK;
}

}  // extern "C"
