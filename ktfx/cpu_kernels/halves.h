// Inputs of AMX for INT8 weights: int16 in two halves, so that the weights are multiplied as they are stored.
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

}  // namespace ktfx
