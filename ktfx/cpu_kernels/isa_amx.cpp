// AVX-512 as above, and AMX-BF16 for groups of many rows (Sapphire Rapids and later).
#define KTFX_NAME amx
#define KTFX_LANES 16
#define KTFX_INT 5
#define KTFX_AMX 2

#if defined(__x86_64__)
#include "tiles.inl"

namespace ktfx {
const KernelTable* table_amx() {
  static const KernelTable table = KTFX_NAME::make_table("amx", table_avx512());
  return &table;
}
}  // namespace ktfx
#endif
