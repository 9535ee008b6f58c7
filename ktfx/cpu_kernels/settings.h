// Numbers that depend on the machine and the format, and that the environment or a call may set instead.
#pragma once
#include <atomic>
#include <cstdlib>

#include "dispatch.h"

namespace ktfx {
struct Setting {
  std::atomic<int> value;  // 0: what suits the machine and the format
  explicit Setting(const char* variable) {
    const char* text = getenv(variable);
    value = text && atoi(text) > 0 ? atoi(text) : 0;
  }
};
inline Setting& amx_setting() {
  static Setting rows{"KTFX_CPU_AMX_ROWS"};
  return rows;
}
inline Setting& ahead_setting() {
  static Setting bytes{"KTFX_CPU_AHEAD"};
  return bytes;
}

// Rows of an expert from which AMX takes it. bf16 and int8 lie as AMX takes them; others have to be unpacked first, which
// the other kernels save. By sweeps over 2 to 16 rows an expert, bf16 on 16 AMX cores, the rest on two.
inline int amx_rows(int format) {
  const int set = amx_setting().value.load(std::memory_order_relaxed);
  if (set) return set;
  return format == KTFX_FMT_BF16 || format == KTFX_FMT_INT8 ? 4 : format >= KTFX_FMT_INT4 ? 12 : 8;
}
inline bool takes_amx(const KernelTable& kernels, int x_dtype, int format, int64_t rows) {
  return kernels.amx && x_dtype == KTFX_BF16 && rows >= amx_rows(format) && format != KTFX_FMT_F32 &&
         format != KTFX_FMT_F16;
}

// Bytes of weights fetched before they are read. Processors with AMX, whatever instructions are in force, wait longer for
// memory that many cores share: a tenth (1 token) to a quarter (16 tokens in int4) less time with 4 KiB than with the
// kernels' own distance, which is best on processors with AVX2 alone. There, integer weights need fewer bytes for the
// same inputs, and more instructions for the same bytes.
inline int ahead_bytes(int format) {
  const int set = ahead_setting().value.load(std::memory_order_relaxed);
  if (set) return set;
  return memory_is_far() ? kFarAhead : format >= KTFX_FMT_INT8 ? 2 * kAhead : kAhead;
}
}  // namespace ktfx
