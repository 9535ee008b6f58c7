// AVX2, FMA and F16C.
#define KTFX_NAME avx2
#define KTFX_LANES 8
#define KTFX_INT 2
#define KTFX_AMX 0

#if defined(__x86_64__)
#include "tiles.inl"

namespace ktfx {
const KernelTable* table_avx2() {
  static const KernelTable table = KTFX_NAME::make_table("avx2");
  return &table;
}
}  // namespace ktfx
#endif
