// The C ABI of the linear layers: one function beside those of ktfx_cpu.h, whose layouts and packing it uses.
#pragma once
#include "ktfx_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

// One linear layer: out = x Wᵀ + bias.
typedef struct {
  ktfx_matrix matrix;      // not paired
  const uint8_t* weights;  // tiles x tile_bytes, 64-byte aligned
  const float* bias;       // (N), or NULL
  const void* x;           // (rows, K), contiguous
  void* out;               // (rows, N) in x's dtype
  int64_t rows;
  int32_t x_dtype;
  int32_t int8_activations;  // 1: 4-bit formats may round x to int8 per 32
  int32_t status;            // ktfx_status, written by the call
  char message[KTFX_MESSAGE];
} ktfx_linear_call;

int32_t ktfx_linear(ktfx_linear_call* call);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
