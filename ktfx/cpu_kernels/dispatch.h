#pragma once
#include "kernel_table.h"

namespace ktfx {
const KernelTable& kernels();  // the table in force: KTFX_CPU_ISA, else the best that this machine runs
}
