// What one instruction set offers the driver in experts.cpp. Each isa_*.cpp fills one table from tiles.inl.
#pragma once
#include "ktfx_cpu.h"

namespace ktfx {

constexpr int kTile = 16;         // outputs a tile
constexpr int kMaxRows = 12;      // rows a register tile can have
constexpr int kFp8Block = 128;
constexpr int kBlock8 = 32;       // inputs that share an int8 activation scale
constexpr int kBlock16 = 64;      // inputs that share an int16 activation scale
constexpr int kAmxChunk = 32;
// Between rows of bf16 for AMX: rows 4 KiB apart would all lie in one set of the nearest cache, which holds fewer of them
// than a tile has.
constexpr int kAmxPad = 32;
constexpr int kAhead = 1024;
constexpr int kFarAhead = 4 * kAhead;

// How the rows of an expert's input lie for the tile kernels.
enum Panel { kPanelF32 = 0, kPanelI16 = 1, kPanelI8 = 2, kPanelBf16Rows = 3 };

// Weights that will be read later, fetched while others are computed with: the line at `at`, which moves on by `step`
// bytes every four inputs. Memory and arithmetic overlap only if the lines are spread over the arithmetic: the processor
// keeps some two dozen on their way, and waits for room when it is asked for more.
struct Ahead {
  const uint8_t* at;
  int64_t step;
};

struct TileArgs {
  const uint8_t* w;    // the tile
  const ktfx_matrix* m;
  const void* x;       // the row block: F32 [Kp][mr], I16 and I8 [Kp/4][mr][4] with k in the order 0 2 1 3 (I16)
  const float* dx;     // [Kp/block][mr] activation scales
  const int32_t* sx;   // [Kp/block][mr] sums of the block's quantised activations
  float* c;            // [mr][16], written if first, else added to
  int32_t k0, k1;      // multiples of 128, or Kp
  int32_t block;       // inputs an activation scale
  bool first;
  const uint8_t* next = nullptr;  // the tile that will be read after this one; null: not known
  int32_t distance = 0;            // bytes fetched before they are read; 0: kAhead
  Ahead ahead = {};                // for f32_near
};

// A row block over inputs [k0, k1) of a tile that was unpacked to a panel.
struct PanelArgs {
  const void* panel;
  const float* scales;  // [block][16]; for int8 [block][scale, scale * zero][16]
  const void* x;
  const float* dx;
  const int32_t* sx;
  float* c;
  int32_t k0, k1, block;
  bool first;
  Ahead ahead;
};

using TileFn = void (*)(const TileArgs*);
using PanelFn = void (*)(const PanelArgs*);

struct KernelTable {
  const char* name;
  int rows, rows_direct;            // the largest register tile; the largest that reads integer tiles as they lie
  int most_direct[4];               // rows of a chunk up to which such tiles pay, by format INT8..MXFP4
  TileFn f32[4][kMaxRows + 1];       // by format F32..FP8, rows
  TileFn f32_near[2][kMaxRows + 1];  // F32 and BF16 that were fetched before, or are a panel; fetches `ahead`
  TileFn i16[4][3][kMaxRows + 1];    // by format INT8..MXFP4, scale dtype, rows
  TileFn i8[4][3][kMaxRows + 1];
  PanelFn panel_i16[kMaxRows + 1], panel_i8[2][kMaxRows + 1];  // int8: wide or not, rows; they fetch `ahead`
  void (*unpack_f32)(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, float* out);
  void (*unpack_i16)(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, int block, void* out, float* scales);
  void (*unpack_i8)(const ktfx_matrix* m, const uint8_t* w, int32_t k0, int32_t k1, int block, void* out, float* scales);
  // AMX: rows x K in bf16 (row stride ldx elements) times two tiles; c0 and c1 are [rows][16]. Fetches two tiles from `next`
  // on. Null without AMX.
  void (*amx)(const ktfx_matrix* m, const uint8_t* w0, const uint8_t* w1, const uint16_t* x, int64_t ldx, int rows,
              float* c0, float* c1, uint16_t* scratch, const uint8_t* next);
  // The same for INT8 tiles as they are stored, rows of halves of int16 (amx.inl), dx a scale a row.
  void (*amx_int8)(const ktfx_matrix* m, const uint8_t* w0, const uint8_t* w1, const uint8_t* x, int64_t ldx, int rows,
                   const float* dx, float* c0, float* c1, const uint8_t* next);
  float (*amx_peak)(const float* x, int64_t n);
  void (*amx_halves)(const float* x, int64_t n, float inverse, uint8_t* high, uint8_t* low);
  void (*amx_begin)();
  void (*amx_end)();
  void (*to_f32)(const void* x, int dtype, float* out, int64_t n, float factor);
  void (*from_f32)(const float* x, void* out, int dtype, int64_t n);
  // One row of K floats to int16 or int8 in blocks; writes q in panel order, dx and sx per block (stride apart).
  void (*quantize)(const float* x, int64_t n, int block, int bits, void* q, int64_t q_stride, float* dx, int32_t* sx,
                   int64_t stride);
  // 16 columns of one row: h = act(gate) * up and kin; s and b (16 each) may be null.
  void (*activate)(const ktfx_layer* layer, const float* gate, const float* up, const float* s_gate, const float* s_up,
                   const float* b_gate, const float* b_up, float* h);
  void (*axpy)(float* out, const float* y, const float* scale, const float* bias, float a, int64_t n);
  // mr rows of n floats (pointers in rows) to [n][mr].
  void (*interleave)(const float* const* rows, int mr, int64_t n, float* out);
  // 16 rows of n words to [n][16].
  void (*transpose)(const uint32_t* const* rows, int64_t n, uint32_t* out);
  // Inputs [k0, k1) of a tile, rounded as ktfx/formats.py does, with their scales and zeros. x: the source's rows as
  // `transpose` leaves them, from k0 on, a multiple of 128. INT8 and FP8 take their scales from scale_in, [groups][16].
  // ahead: 16 rows whose next k1 - k0 inputs are fetched meanwhile, or null. false: some value is NaN or inf (INT8 and
  // FP8: their scales would say so).
  bool (*encode)(const ktfx_matrix* m, int dtype, const void* x, int32_t k0, int32_t k1, const float* scale_in,
                 const char* const* ahead, uint8_t* tile);
  // One row of n inputs: raises some of peaks[k / group][16] to the bits of the largest magnitude, a 16-bit float's in
  // the upper half.
  void (*row_peaks)(const void* row, int dtype, int64_t n, int64_t group, int32_t* peaks);
  double (*sum)(const uint8_t* data, int64_t bytes, bool fetch);  // reads every byte; fetch: in one stream, far ahead
  double (*fma)(int64_t rounds);                      // returns the float operations done
};

const KernelTable* table_portable();
const KernelTable* table_amx_emulated();
#if defined(__x86_64__)
const KernelTable* table_avx2();
const KernelTable* table_avx512();
const KernelTable* table_amx();
#endif

// The factor put on float activations and its inverse on the result, so that the exponent trick of FP8 stays in range.
inline float input_factor(int format) { return format == KTFX_FMT_FP8 ? 0x1p60f : 1.0f; }

}  // namespace ktfx
