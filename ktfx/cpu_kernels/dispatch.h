#pragma once
#include "kernel_table.h"

namespace ktfx {
const KernelTable& kernels();  // the table in force: KTFX_CPU_ISA, else the best that this machine runs
bool memory_is_far();          // a processor of the kind whose many cores share one memory: those with AMX

// `bytes` from `from` on, to be fetched while `parts` row blocks pass over `inputs` inputs: the part'th one's share.
inline Ahead share_ahead(const uint8_t* from, int64_t bytes, int part, int parts, int inputs) {
  const int64_t all = (int64_t)parts * inputs;
  return {from + bytes * part / parts, (bytes * 4 + all - 1) / all};
}

// Whether a chunk of so many rows multiplies integer tiles as they lie, in row blocks of rows_direct at most.
inline bool takes_tiles(const KernelTable& kt, int format, int rows) {
  return format >= KTFX_FMT_INT8 && rows <= kt.most_direct[format - KTFX_FMT_INT8];
}
inline int block_rows(const KernelTable& kt, int format, int rows) {
  return takes_tiles(kt, format, rows) ? kt.rows_direct : kt.rows;
}
// Whether it multiplies a panel that the tile is unpacked to.
inline bool takes_panel(const KernelTable& kt, int format, int rows) {
  if (format == KTFX_FMT_F32 || format == KTFX_FMT_BF16) return false;
  return rows > kt.rows_direct && !takes_tiles(kt, format, rows);
}

inline int input_bits(int format) {
  if (format == KTFX_FMT_F32) return 32;
  if (format <= KTFX_FMT_F16) return 16;
  return format <= KTFX_FMT_INT8 ? 8 : 4;
}
}
