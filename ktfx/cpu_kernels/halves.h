// AMX as experts and linear layers call it, and its inputs for INT8 weights: int16 in two halves, so that the weights are
// multiplied as they are stored.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernel_table.h"

namespace ktfx {

// Steps of AMX are 64 inputs; other rows go through bf16.
inline bool halves_serve(const ktfx_matrix& m) { return m.format == KTFX_FMT_INT8 && m.Kp % 64 == 0; }

// From row to row: as many bytes as of bf16.
inline int64_t halves_row_bytes(const ktfx_matrix& m) { return 2 * ((int64_t)m.Kp + kAmxPad); }

// A row of n inputs as halves of int16 for AMX: high bytes, from Kp on low ones. Returns its scale, NaN if a number of the
// row is not finite. The row may not be where it is written to.
inline float halve_row(const KernelTable& kt, const void* x, int dtype, int64_t n, int64_t Kp, uint8_t* to) {
  constexpr int64_t kPiece = 4096;
  float piece[kPiece];
  auto read = [&](int64_t k) {
    const int64_t all = std::min(kPiece, Kp - k), real = std::max<int64_t>(0, std::min(all, n - k));
    kt.to_f32((const char*)x + k * (dtype == KTFX_F32 ? 4 : 2), dtype, piece, real, 1.0f);
    std::fill(piece + real, piece + all, 0.0f);
    return all;
  };
  float peak = 0.0f;
  for (int64_t k = 0; k < Kp; k += kPiece) {
    const float found = kt.amx_peak(piece, read(k));
    peak = found > peak || found != found ? found : peak;
    if (found != found) break;
  }
  const float inverse = peak > 1e-30f ? 32767.0f / peak : 0.0f;  // 0 for NaN too
  for (int64_t k = 0; k < Kp; k += kPiece) {
    const int64_t all = read(k);
    if (inverse > 0.0f) {
      kt.amx_halves(piece, all, inverse, to + k, to + Kp + k);
    } else {
      memset(to + k, 0, all);
      memset(to + Kp + k, 0, all);
    }
  }
  return peak != peak ? peak : inverse > 0.0f ? peak / 32767.0f : 0.0f;
}

// c[tile][rows][16] for `tiles` tiles from `w` on, two at a time. q: rows of halves, with their scales dx, or of bf16.
// after: what is most likely read next. scratch: for other formats than BF16 where rows are bf16.
inline void multiply_amx(const KernelTable& kt, const ktfx_matrix& m, bool halves, const uint8_t* w, int tiles,
                         const uint8_t* after, const void* q, const float* dx, int rows, float* c, float* scratch) {
  for (int t = 0; t < tiles; t += 2) {
    const uint8_t *w0 = w + t * m.tile_bytes, *w1 = t + 1 < tiles ? w0 + m.tile_bytes : nullptr;
    const uint8_t* next = t + 2 < tiles ? w0 + 2 * m.tile_bytes : after;
    float *c0 = c + (int64_t)t * rows * kTile, *c1 = c0 + (int64_t)rows * kTile;
    if (halves) kt.amx_int8(&m, w0, w1, (const uint8_t*)q, halves_row_bytes(m), rows, dx, c0, c1, next);
    else
      kt.amx(&m, w0, w1, (const uint16_t*)q, m.Kp + kAmxPad, rows, c0, c1, (uint16_t*)scratch, next);
  }
}

}  // namespace ktfx
