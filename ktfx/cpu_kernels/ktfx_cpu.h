// The C ABI of the CPU kernels. No torch headers: one binary serves every torch version, Python calls it by ctypes, and
// a CUDA graph's host function calls ktfx_host_call with a pointer argument.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define KTFX_ABI 3
#define KTFX_MESSAGE 192
#define KTFX_PROFILE 11

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum ktfx_dtype { KTFX_F32 = 0, KTFX_BF16 = 1, KTFX_F16 = 2, KTFX_I32 = 3, KTFX_I64 = 4, KTFX_E8M0 = 5 };
enum ktfx_format {
  KTFX_FMT_F32 = 0,
  KTFX_FMT_BF16 = 1,
  KTFX_FMT_F16 = 2,
  KTFX_FMT_FP8 = 3,     // e4m3, one float scale per 128 x 128
  KTFX_FMT_INT8 = 4,    // one float scale per output
  KTFX_FMT_INT4 = 5,    // code - 8, a scale per group along the input
  KTFX_FMT_INT4ZP = 6,  // code - zero
  KTFX_FMT_MXFP4 = 7,   // e2m1, an exponent per 32
};
enum ktfx_activation {
  KTFX_SILU = 0,
  KTFX_GELU = 1,
  KTFX_GELU_TANH = 2,
  KTFX_RELU = 3,
  KTFX_RELU2 = 4,
  KTFX_NONE = 5
};
enum ktfx_gate { KTFX_GATE_MUL = 0, KTFX_GATE_CLAMPED = 1, KTFX_GATE_NONE = 2 };
enum ktfx_status { KTFX_OK = 0, KTFX_BAD_ID = 1, KTFX_BAD_ARGUMENT = 2, KTFX_NO_MEMORY = 3, KTFX_SHUT_DOWN = 4 };

// How one weight matrix of every expert lies; filled by ktfx_matrix_layout.
typedef struct {
  int32_t format, group, scale_dtype;  // group: inputs that share a scale, 0 = all
  int32_t N, K, Kp, tiles;             // outputs, inputs, inputs padded, tiles of 16 outputs
  int32_t paired;                      // 1: tiles alternate gate, up (N = 2I)
  int64_t tile_bytes, scale_offset, zero_offset;
} ktfx_matrix;

typedef struct {
  int32_t num_experts, hidden, intermediate;
  int32_t activation, gate;
  float alpha, limit;
  int32_t int8_activations;  // 1: 4-bit formats may round activations to int8 per 32
  ktfx_matrix up, down;
  const uint8_t *up_weights, *down_weights;  // num_experts x tiles x tile_bytes, 64-byte aligned
  const float *up_bias, *down_bias;          // (E, 2I or I), gate then up; (E, H); or NULL
} ktfx_layer;

typedef struct {
  const ktfx_layer* layer;
  const void *x, *ids, *weights;  // (T, H), (T, K), (T, K), contiguous
  void* out;                      // (T, H) in x's dtype
  int64_t tokens;
  int32_t chosen, x_dtype, id_dtype, weight_dtype;
  int32_t status;  // ktfx_status, written by the call
  char message[KTFX_MESSAGE];
} ktfx_call;

// A weight to pack: one expert's (N, K) matrix with its own strides (in elements), or its part of a
// formats.QuantizedWeight (contiguous).
typedef struct {
  const void* data;
  int32_t dtype;  // of data when it holds floats
  int64_t row_stride, column_stride;
  int32_t interleaved;  // rows g0, u0, g1, u1, ...
  int32_t quantized;    // 1: data, scales and zeros are a QuantizedWeight's
  const void *scales, *zeros;
} ktfx_source;

int32_t ktfx_abi(void);
const char* ktfx_isa(void);              // the path in force
const char* ktfx_isas(void);             // comma-separated, those this machine can run
int32_t ktfx_set_isa(const char* name);  // 0, or KTFX_BAD_ARGUMENT where this machine cannot run it
int32_t ktfx_amx_rows(void);             // rows of one expert from which AMX takes it (KTFX_CPU_AMX_ROWS); 0: by format
void ktfx_set_amx_rows(int32_t rows);    // for measurements; 0 is the default
int32_t ktfx_ahead(void);                // bytes of weights fetched before they are read (KTFX_CPU_AHEAD); 0: by format
void ktfx_set_ahead(int32_t bytes);      // for measurements
int32_t ktfx_threads(void);
int32_t ktfx_set_threads(int32_t threads, int32_t shares);  // 0: what the machine has; waits for running calls
int32_t ktfx_shares(void);

int32_t ktfx_matrix_layout(ktfx_matrix* m, int32_t format, int32_t group, int32_t scale_dtype, int32_t N, int32_t K,
                           int32_t paired);
// Packs `experts` sources into out (experts x tiles x tile_bytes, 64-byte aligned) on all threads.
int32_t ktfx_pack(const ktfx_matrix* m, const ktfx_source* sources, int32_t experts, uint8_t* out, char* message);
// One expert's tiles to floats (N, K), gate rows then up rows: the weights that the kernels compute with.
int32_t ktfx_unpack(const ktfx_matrix* m, const uint8_t* packed, float* out);
// The inverse of ktfx_pack for F32, BF16 and F16: the model's own numbers, bit for bit, to where the targets say (their
// data is written to, in the format's dtype). KTFX_BAD_ARGUMENT for formats that round.
int32_t ktfx_restore(const ktfx_matrix* m, const uint8_t* packed, const ktfx_source* targets, int32_t experts,
                     char* message);
// 128 bits that tell contents apart (not against forgery), on all threads; the same on every machine of one byte order.
int32_t ktfx_hash(const void* data, int64_t bytes, uint64_t out[2]);
// Before packing: huge pages, and every node's share of every expert in that node's memory.
void ktfx_place(uint8_t* data, const ktfx_matrix* m, int32_t experts, int32_t is_down);

void ktfx_wake(void);  // threads that sleep begin to spin for a while: a call will come soon
int32_t ktfx_experts(ktfx_call* call);
// The same from numbers: dtypes of x, ids and weights, a byte each from the lowest. What went wrong: ktfx_last_message.
int32_t ktfx_experts_now(const ktfx_layer* layer, const void* x, const void* ids, const void* weights, void* out,
                         int64_t tokens, int32_t chosen, int32_t dtypes);
const char* ktfx_last_message(void);  // of this thread's last ktfx_experts_now that failed
int64_t ktfx_submit(const ktfx_call* call);         // copies the call; a ticket > 0
int32_t ktfx_wait(int64_t ticket, char* message);   // the call's status; a ticket can be waited for once
void ktfx_host_call(void* call);                    // a ktfx_call*: what cudaLaunchHostFunc takes

// A thread that watches flags in pinned memory: when *start becomes 1 it clears it, runs the call and sets *done to 1
// (2 if the call failed: its message is in the call). Every way out sets *done, so a waiting stream cannot hang.
typedef struct ktfx_poller ktfx_poller;
ktfx_poller* ktfx_poller_create(void);
int32_t ktfx_poller_add(ktfx_poller*, ktfx_call* call, volatile uint32_t* start, volatile uint32_t* done);
void ktfx_poller_arm(ktfx_poller*, int32_t on);  // armed it polls, else it sleeps
void ktfx_poller_destroy(ktfx_poller*);

// Sums since the last call of this function, in seconds: [0] calls (parts of calls with very many tokens), [1] sorting and
// laying out, [2] up, [6] down, [10] the sum over choices. After up and down, as means over the threads: how late they
// began, how long they waited for the last, and how many of them (a fraction of one) took no task at all.
void ktfx_profile(int32_t on, double* sums);
// Bytes per second, all threads, the same pool. fetch: with prefetch instructions (one stream a thread) or without (four).
double ktfx_measure_read(const void* data, int64_t bytes, int32_t fetch);
double ktfx_measure_fma(void);                              // float operations per second, all threads

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
