// One linear layer: out = x Wᵀ + bias, W in the tiles that ktfx_pack makes (one "expert").
//
// Rows of x are laid in row blocks, as many rows as the register tile takes, the way the tile kernels read them; then
// every task multiplies a few tiles of 16 outputs with one chunk of rows and writes the outputs. Each output's sum runs in
// one order whatever thread does what, so results do not depend on the number of threads.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "dispatch.h"
#include "halves.h"
#include "ktfx_linear.h"
#include "pool.h"
#include "settings.h"

namespace ktfx {
namespace {

constexpr int kChunkRows = 96;    // rows a task
constexpr int kTaskTiles = 8;     // tiles a task, at most
constexpr int kInputBlock = 512;  // inputs whose weights stay in the nearest cache while many rows pass over them
constexpr int kQuantized = 4096;  // inputs turned to floats at a time; a multiple of every block
constexpr int kPanelFloats = 256 * kTile + 2 * kTile * kInputBlock / 32;  // a panel and its scales
constexpr int64_t kPartBytes = 256ll << 20;                               // of laid-out rows at a time

struct RowBlock {
  int64_t row;
  int32_t rows;
  char* q;  // the panel; bf16 rows for AMX
  float* dx;
  int32_t* sx;
};
struct Chunk {
  int32_t first, last;  // row blocks [first, last)
  int64_t row;
  int32_t rows;
};

struct Memory {
  void* at = nullptr;
  int64_t size = 0;
  ~Memory() { free(at); }
  bool reserve(int64_t bytes) {
    if (bytes <= size) return true;
    free(at);
    size = (bytes + 4095) & ~4095ll;
    at = aligned_alloc(128, size);
    if (!at) size = 0;
    return at != nullptr;
  }
};

struct Run {
  const ktfx_linear_call* call;
  const ktfx_matrix* m;
  const KernelTable* kernels;
  Pool* pool;
  Panel panel;
  int block, bits, element;
  bool amx, halves;
  int64_t begin;  // of this part's rows
  int task_tiles;
  std::vector<RowBlock> blocks;
  std::vector<Chunk> chunks;
  float* scratch;
  int64_t scratch_floats;
};

int dtype_bytes(int dtype) { return dtype == KTFX_F32 ? 4 : 2; }
int64_t padded(int64_t bytes) { return (bytes + 127) & ~127ll; }

void choose_panel(Run& r) {
  const int f = r.m->format;
  if (f <= KTFX_FMT_FP8) r.panel = kPanelF32, r.block = 1 << 30, r.bits = 32, r.element = 4;
  else if (f >= KTFX_FMT_INT4 && r.call->int8_activations) r.panel = kPanelI8, r.block = kBlock8, r.bits = 8, r.element = 1;
  else r.panel = kPanelI16, r.block = r.m->group == 32 ? 32 : kBlock16, r.bits = 16, r.element = 2;
}

// Chunks and row blocks of `rows` rows; the same cut for every call of so many rows.
void cut(Run& r, int64_t rows) {
  r.blocks.clear();
  r.chunks.clear();
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  int64_t done = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    // AMX wants whole multiples of 32 rows, the register tiles want equal chunks.
    const int32_t n = (int32_t)(r.amx ? std::min<int64_t>(kChunkRows, rows - done) : rows / chunks + (i < rows % chunks));
    Chunk c{(int32_t)r.blocks.size(), 0, done, n};
    const int32_t most = block_rows(*r.kernels, r.m->format, n), parts = r.amx ? 1 : (n + most - 1) / most;
    for (int32_t j = 0; j < parts; ++j) {
      const int32_t size = n / parts + (j < n % parts);
      r.blocks.push_back({done, size, nullptr, nullptr, nullptr});
      done += size;
    }
    c.last = (int32_t)r.blocks.size();
    r.chunks.push_back(c);
  }
}

int64_t block_bytes(const Run& r, int rows) {
  const int64_t Kp = r.m->Kp;
  if (r.amx) return padded(rows * (Kp + kAmxPad) * 2) + (r.halves ? padded(rows * 4) : 0);
  const int64_t scales = r.panel == kPanelF32 ? 0 : padded((Kp + r.block - 1) / r.block * rows * 4) * 2;
  return padded(rows * Kp * r.element) + scales;
}

bool lay_out(Run& r, Memory& memory) {
  const int64_t Kp = r.m->Kp;
  const int64_t product = (int64_t)kTaskTiles * kChunkRows * kTile;
  const int64_t tail = std::max<int64_t>(kPanelFloats, r.amx ? Kp * kTile : 0);
  r.scratch_floats = padded(4 * std::max<int64_t>(product + tail, kMaxRows * Kp)) / 4;
  int64_t bytes = r.scratch_floats * 4 * r.pool->threads();
  for (const RowBlock& b : r.blocks) bytes += block_bytes(r, b.rows);
  if (!memory.reserve(bytes)) return false;
  r.scratch = (float*)memory.at;
  char* at = (char*)memory.at + r.scratch_floats * 4 * r.pool->threads();
  for (RowBlock& b : r.blocks) {
    b.q = at;
    if (r.halves) b.dx = (float*)(at + padded(b.rows * halves_row_bytes(*r.m)));
    if (!r.amx && r.panel != kPanelF32) {
      const int64_t blocks = (Kp + r.block - 1) / r.block;
      b.dx = (float*)(at + padded(b.rows * Kp * r.element));
      b.sx = (int32_t*)((char*)b.dx + padded(blocks * b.rows * 4));
    }
    at += block_bytes(r, b.rows);
  }
  return true;
}

void fill_block(const Run& r, const RowBlock& b, float* scratch) {
  const int64_t K = r.m->K, Kp = r.m->Kp;
  const int dtype = r.call->x_dtype, e = dtype_bytes(dtype);
  const char* x = (const char*)r.call->x + (r.begin + b.row) * K * e;
  if (r.halves) {
    for (int i = 0; i < b.rows; ++i)
      b.dx[i] = halve_row(*r.kernels, x + i * K * e, dtype, K, Kp, (uint8_t*)b.q + i * halves_row_bytes(*r.m));
    return;
  }
  if (r.amx) {
    for (int i = 0; i < b.rows; ++i) {
      uint16_t* to = (uint16_t*)b.q + i * (Kp + kAmxPad);
      memcpy(to, x + i * K * 2, K * 2);
      memset(to + K, 0, (Kp - K) * 2);
    }
    return;
  }
  if (r.panel == kPanelF32) {
    const float* rows[kMaxRows];
    for (int i = 0; i < b.rows; ++i) {
      float* to = b.rows == 1 ? (float*)b.q : scratch + i * Kp;
      r.kernels->to_f32(x + i * K * e, dtype, to, K, input_factor(r.m->format));
      std::fill(to + K, to + Kp, 0.0f);
      rows[i] = to;
    }
    if (b.rows > 1) r.kernels->interleave(rows, b.rows, Kp, (float*)b.q);
    return;
  }
  for (int i = 0; i < b.rows; ++i)
    for (int64_t k = 0; k < Kp; k += kQuantized) {
      const int64_t n = std::min<int64_t>(kQuantized, Kp - k), real = std::max<int64_t>(0, std::min(n, K - k));
      r.kernels->to_f32(x + (i * K + k) * e, dtype, scratch, real, 1.0f);
      std::fill(scratch + real, scratch + n, 0.0f);
      const int64_t at = k / r.block * b.rows + i;
      r.kernels->quantize(scratch, n, r.block, r.bits, b.q + (k * b.rows + 4 * i) * r.element,
                          4ll * b.rows * r.element, b.dx + at, b.sx + at, b.rows);
    }
}

void fill_task(void* context, int share, int64_t task, int worker) {
  Run& r = *(Run*)context;
  const int64_t n = (int64_t)r.blocks.size();
  fill_block(r, r.blocks[share_begin(n, share, r.pool->shares()) + task], r.scratch + worker * r.scratch_floats);
}

// ahead: null where the kernel fetches its own weights.
TileFn tile_kernel(const Run& r, int rows, const Ahead* ahead) {
  const int f = r.m->format;
  if (r.panel == kPanelF32) return (ahead && f <= KTFX_FMT_BF16 ? r.kernels->f32_near : r.kernels->f32)[f][rows];
  const int s = r.m->scale_dtype == KTFX_BF16 ? 1 : r.m->scale_dtype == KTFX_F16 ? 2 : 0;
  return (r.panel == kPanelI16 ? r.kernels->i16 : r.kernels->i8)[r.m->format - KTFX_FMT_INT8][s][rows];
}

// One row block over inputs [k, end) of a tile, or of the panel that it was unpacked to.
void multiply_rows(const Run& r, const uint8_t* tile, const float* panel, const Ahead* ahead, const RowBlock& b, int k,
                   int end, float* c) {
  const KernelTable& kt = *r.kernels;
  if (!panel) {
    const TileArgs a{tile, r.m, b.q, b.dx, b.sx, c, k, end, r.block, k == 0, tile + r.m->tile_bytes,
                     ahead_bytes(r.m->format), ahead ? *ahead : Ahead{}};
    tile_kernel(r, b.rows, ahead)(&a);
  } else if (r.panel == kPanelF32) {
    const float* x = (const float*)b.q + (int64_t)k * b.rows;  // the panel begins at input 0
    const TileArgs a{(const uint8_t*)panel, nullptr, x, nullptr, nullptr, c, 0, end - k, r.block, k == 0, nullptr, 0,
                     *ahead};
    kt.f32_near[KTFX_FMT_F32][b.rows](&a);
  } else {
    const PanelArgs a{panel, panel + 256 * kTile, b.q, b.dx, b.sx, c, k, end, r.block, k == 0, *ahead};
    (r.panel == kPanelI16 ? kt.panel_i16 : kt.panel_i8[r.m->format == KTFX_FMT_MXFP4])[b.rows](&a);
  }
}

// c[tile][rows of the chunk][16] for `tiles` tiles from `w` on.
void multiply(const Run& r, const uint8_t* w, int tiles, const Chunk& chunk, float* c, float* scratch) {
  const KernelTable& kt = *r.kernels;
  const ktfx_matrix& m = *r.m;
  if (r.amx) {
    const RowBlock& b = r.blocks[chunk.first];
    multiply_amx(kt, m, r.halves, w, tiles, w + tiles * m.tile_bytes, b.q, b.dx, chunk.rows, c, scratch);
    return;
  }
  const int parts = chunk.last - chunk.first;
  const bool unpack = takes_panel(kt, m.format, chunk.rows), tile_whole = takes_tiles(kt, m.format, chunk.rows);
  // A panel holds kInputBlock inputs of two bytes, or half as many floats.
  const int many = r.panel == kPanelF32 ? kInputBlock / 2 : kInputBlock;
  const int step = unpack ? many : parts > 1 && !tile_whole ? kInputBlock : m.Kp;
  const int64_t bits = input_bits(m.format) * kTile;
  for (int k = 0; k < m.Kp; k += step)
    for (int t = 0; t < tiles; ++t) {
      const int end = std::min(k + step, m.Kp);
      const uint8_t* tile = w + t * m.tile_bytes;
      // Next: the next tile's inputs, else the first tile's next ones, else what the next task reads.
      const bool last_tile = t + 1 == tiles, last = last_tile && end == m.Kp;
      const int from = last ? 0 : last_tile ? end : k;
      const uint8_t* next = (last ? w + tiles * m.tile_bytes : last_tile ? w : tile + m.tile_bytes) + from * bits / 8;
      const int64_t bytes = std::min(step, m.Kp - from) * bits / 8;
      if (unpack) {
        if (r.panel == kPanelF32) kt.unpack_f32(&m, tile, k, end, scratch);
        else
          (r.panel == kPanelI16 ? kt.unpack_i16 : kt.unpack_i8)(&m, tile, k, end, r.block, scratch, scratch + 256 * kTile);
      }
      float* to = c + (int64_t)t * chunk.rows * kTile;
      for (int i = chunk.first; i < chunk.last; ++i) {
        const Ahead ahead = share_ahead(next, bytes, i - chunk.first, parts, end - k);
        multiply_rows(r, tile, unpack ? scratch : nullptr, unpack || parts > 1 ? &ahead : nullptr, r.blocks[i], k, end, to);
        to += r.blocks[i].rows * kTile;
      }
    }
}

void product_task(void* context, int share, int64_t task, int worker) {
  Run& r = *(Run*)context;
  const ktfx_matrix& m = *r.m;
  const int shares = r.pool->shares();
  const int64_t begin = share_begin(m.tiles, share, shares), end = share_begin(m.tiles, share + 1, shares);
  const int64_t groups = (end - begin + r.task_tiles - 1) / r.task_tiles;
  const Chunk& chunk = r.chunks[task / groups];
  const int tile = (int)(begin + task % groups * r.task_tiles);
  const int tiles = (int)std::min<int64_t>(r.task_tiles, end - tile);
  float* c = r.scratch + worker * r.scratch_floats;
  const uint8_t* w = r.call->weights + tile * m.tile_bytes;
  if (r.amx) r.kernels->amx_begin();
  multiply(r, w, tiles, chunk, c, c + (int64_t)kTaskTiles * kChunkRows * kTile);
  if (r.amx) r.kernels->amx_end();
  const int64_t column = (int64_t)tile * kTile, columns = std::min<int64_t>((int64_t)tiles * kTile, m.N - column);
  const int e = dtype_bytes(r.call->x_dtype);
  float bias[kTaskTiles * kTile] = {}, line[kTaskTiles * kTile];
  if (r.call->bias) std::copy(r.call->bias + column, r.call->bias + column + columns, bias);
  for (int row = 0; row < chunk.rows; ++row) {
    std::fill(line, line + tiles * kTile, 0.0f);
    for (int t = 0; t < tiles; ++t) {
      const uint8_t* at = w + t * m.tile_bytes;
      const float* scale = m.format == KTFX_FMT_INT8 ? (const float*)(at + m.scale_offset) : nullptr;
      r.kernels->axpy(line + t * kTile, c + ((int64_t)t * chunk.rows + row) * kTile, scale, bias + t * kTile, 1.0f, kTile);
    }
    char* out = (char*)r.call->out + ((r.begin + chunk.row + row) * m.N + column) * e;
    r.kernels->from_f32(line, out, r.call->x_dtype, columns);
  }
}

int32_t fail(ktfx_linear_call* call, int32_t status, const char* text) {
  snprintf(call->message, sizeof call->message, "%s", text);
  return call->status = status;
}

int32_t run_linear(ktfx_linear_call* call) {
  call->message[0] = 0;
  if (call->rows == 0) return call->status = KTFX_OK;
  if (!call->x || !call->out || !call->weights || call->rows < 0)
    return fail(call, KTFX_BAD_ARGUMENT, "a pointer of the call is null, or the number of rows is negative");
  if (call->x_dtype < 0 || call->x_dtype > KTFX_F16)
    return fail(call, KTFX_BAD_ARGUMENT, "x is of a dtype that the kernels do not take");
  // Of the thread that calls: no other thread's call can touch it, and a fork leaves no lock behind.
  static thread_local Memory memory;
  std::shared_ptr<Pool> p = pool();
  std::lock_guard<std::mutex> hold(p->busy);
  p->begin_call();
  Run r = {};
  r.call = call;
  r.m = &call->matrix;
  r.kernels = &kernels();
  r.pool = p.get();
  choose_panel(r);
  const int shares = p->shares();
  r.amx = takes_amx(*r.kernels, call->x_dtype, r.m->format, call->rows);
  r.halves = r.amx && halves_serve(*r.m);
  r.task_tiles = std::max(1, std::min(kTaskTiles, r.m->tiles / (8 * p->threads())));
  if (r.amx && r.task_tiles > 1) r.task_tiles &= ~1;  // it takes tiles in pairs
  const int64_t part = std::max<int64_t>(kChunkRows, kPartBytes / (r.m->Kp * 4ll) / kChunkRows * kChunkRows);
  for (r.begin = 0; r.begin < call->rows; r.begin += part) {
    cut(r, std::min(part, call->rows - r.begin));
    if (!lay_out(r, memory)) return fail(call, KTFX_NO_MEMORY, "no memory for the call's inputs");
    int64_t tasks[kMaxShares];
    const int64_t blocks = (int64_t)r.blocks.size();
    if (blocks == 1) {
      fill_block(r, r.blocks[0], r.scratch);
    } else {
      for (int s = 0; s < shares; ++s) tasks[s] = share_begin(blocks, s + 1, shares) - share_begin(blocks, s, shares);
      p->run(tasks, fill_task, &r);
    }
    for (int s = 0; s < shares; ++s) {
      const int64_t n = share_begin(r.m->tiles, s + 1, shares) - share_begin(r.m->tiles, s, shares);
      tasks[s] = (n + r.task_tiles - 1) / r.task_tiles * (int64_t)r.chunks.size();
    }
    p->run(tasks, product_task, &r);
  }
  return call->status = KTFX_OK;
}

}  // namespace
}  // namespace ktfx

extern "C" int32_t ktfx_linear(ktfx_linear_call* call) {
  if (!call) return KTFX_BAD_ARGUMENT;
  try {
    return ktfx::run_linear(call);
  } catch (const std::bad_alloc&) {
    return ktfx::fail(call, KTFX_NO_MEMORY, "no memory for the call's bookkeeping");
  } catch (const std::exception& e) {
    return ktfx::fail(call, KTFX_BAD_ARGUMENT, e.what());
  }
}
