// AMX's code path with emulated tile registers, for tests on machines without AMX.
#define KTFX_NAME amx_emulated
#define KTFX_LANES 16
#define KTFX_INT 0
#define KTFX_AMX 1

#include "tiles.inl"

namespace ktfx {
const KernelTable* table_amx_emulated() {
  static const KernelTable table = KTFX_NAME::make_table("amx-emulated", table_portable());
  return &table;
}
}  // namespace ktfx
