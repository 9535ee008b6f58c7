#pragma once
#include "kernel_table.h"

namespace ktfx {
const KernelTable& kernels();  // the table in force: KTFX_CPU_ISA, else the best that this machine runs

// `bytes` from `from` on, to be fetched while `parts` row blocks pass over `inputs` inputs: the part'th one's share.
inline Ahead share_ahead(const uint8_t* from, int64_t bytes, int part, int parts, int inputs) {
  const int64_t all = (int64_t)parts * inputs;
  return {from + bytes * part / parts, (bytes * 4 + all - 1) / all};
}

inline int input_bits(int format) {
  if (format == KTFX_FMT_F32) return 32;
  if (format <= KTFX_FMT_F16) return 16;
  return format <= KTFX_FMT_INT8 ? 8 : 4;
}
}
