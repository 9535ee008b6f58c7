// One experts layer on ggml's CPU backend, as llama.cpp builds it: mul_mat_id for gate and up, silu and product,
// mul_mat_id for down, the weighted sum. cpu_experts_table.py compiles this against the headers named by --ggml.
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"
#if __has_include("ggml-cpu.h")
#include "ggml-cpu.h"
#define HAS_REGISTRY 1
#endif

#define MOST_LAYERS 8

struct experts {
  int hidden, intermediate, num_experts, chosen, layers;
  ggml_backend_t backend;
  ggml_backend_buffer_type_t weights_in;
  struct ggml_tensor *gate[MOST_LAYERS], *up[MOST_LAYERS], *down[MOST_LAYERS];
  ggml_gallocr_t memory;
  // The graph of the last call, for that many tokens and that layer.
  struct ggml_context* graph_context;
  struct ggml_cgraph* graph;
  int graph_tokens, graph_layer;
  struct ggml_tensor *x, *ids, *weights, *out;
};

// A buffer type by its name (llama.cpp keeps weights in "CPU_REPACK" where it can), or null.
static ggml_backend_buffer_type_t buffer_type(const char* name) {
#ifdef HAS_REGISTRY
  ggml_backend_reg_t reg = ggml_backend_cpu_reg();
  ggml_backend_dev_get_extra_bufts_t get =
      (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
  if (!get) return NULL;
  ggml_backend_buffer_type_t* all = get(ggml_backend_reg_dev_get(reg, 0));
  for (; all && *all; ++all)
    if (!strcmp(ggml_backend_buft_name(*all), name)) return *all;
#else
  (void)name;
#endif
  return NULL;
}

struct experts* experts_new(int hidden, int intermediate, int num_experts, int chosen, int threads, const char* buffer) {
  struct experts* e = calloc(1, sizeof *e);
  e->hidden = hidden;
  e->intermediate = intermediate;
  e->num_experts = num_experts;
  e->chosen = chosen;
  e->graph_layer = -1;
  e->backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(e->backend, threads);
  e->weights_in = *buffer ? buffer_type(buffer) : ggml_backend_cpu_buffer_type();
  e->memory = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
  if (e->weights_in) return e;
  free(e);
  return NULL;
}

static struct ggml_tensor* weight(struct ggml_context* context, enum ggml_type type, int inputs, int outputs, int n) {
  return ggml_new_tensor_3d(context, type, inputs, outputs, n);
}

// Adds a layer: float weights (E, N, K) of gate, up and down, rounded to `type`. Returns its bytes, 0 if that failed.
int64_t experts_add(struct experts* e, int type, const float* gate, const float* up, const float* down) {
  struct ggml_init_params params = {16 * ggml_tensor_overhead(), NULL, true};
  struct ggml_context* context = ggml_init(params);
  const enum ggml_type t = (enum ggml_type)type;
  struct ggml_tensor* all[3] = {weight(context, t, e->hidden, e->intermediate, e->num_experts),
                                weight(context, t, e->hidden, e->intermediate, e->num_experts),
                                weight(context, t, e->intermediate, e->hidden, e->num_experts)};
  if (e->layers == MOST_LAYERS || !ggml_backend_alloc_ctx_tensors_from_buft(context, e->weights_in)) return 0;
  const float* from[3] = {gate, up, down};
  int64_t bytes = 0;
  for (int i = 0; i < 3; ++i) {
    const int64_t rows = ggml_nelements(all[i]) / all[i]->ne[0];
    void* rounded = malloc(ggml_nbytes(all[i]));
    ggml_quantize_chunk(t, from[i], rounded, 0, rows, all[i]->ne[0], NULL);
    ggml_backend_tensor_set(all[i], rounded, 0, ggml_nbytes(all[i]));
    bytes += ggml_nbytes(all[i]);
    free(rounded);
  }
  e->gate[e->layers] = all[0];
  e->up[e->layers] = all[1];
  e->down[e->layers] = all[2];
  e->layers++;
  return bytes;
}

static bool build(struct experts* e, int layer, int tokens) {
  if (e->graph_context) ggml_free(e->graph_context);
  struct ggml_init_params params = {1 << 20, NULL, true};
  struct ggml_context* c = e->graph_context = ggml_init(params);
  e->x = ggml_new_tensor_3d(c, GGML_TYPE_F32, e->hidden, 1, tokens);
  e->ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, e->chosen, tokens);
  e->weights = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, e->chosen, tokens);
  ggml_set_input(e->x);
  ggml_set_input(e->ids);
  ggml_set_input(e->weights);
#ifdef GGML_FUSED_UP_GATE
  struct ggml_tensor* h = ggml_moe_up_gate(c, e->up[layer], e->gate[layer], e->x, e->ids, GGML_UNARY_OP_SILU);
#else
  struct ggml_tensor* up = ggml_mul_mat_id(c, e->up[layer], e->x, e->ids);
  struct ggml_tensor* gate = ggml_mul_mat_id(c, e->gate[layer], e->x, e->ids);
  struct ggml_tensor* h = ggml_swiglu_split(c, gate, up);
#endif
  struct ggml_tensor* y = ggml_mul(c, ggml_mul_mat_id(c, e->down[layer], h, e->ids), e->weights);
  struct ggml_tensor* sum = NULL;
  for (int k = 0; k < e->chosen; ++k) {
    struct ggml_tensor* one = ggml_view_2d(c, y, e->hidden, tokens, y->nb[2], k * y->nb[1]);
    sum = sum ? ggml_add(c, sum, one) : one;
  }
  e->out = e->chosen == 1 ? ggml_cont(c, sum) : sum;
  ggml_set_output(e->out);
  e->graph = ggml_new_graph(c);
  ggml_build_forward_expand(e->graph, e->out);
  e->graph_layer = layer;
  e->graph_tokens = tokens;
  return ggml_gallocr_alloc_graph(e->memory, e->graph);
}

// x (T, H), ids (T, K), weights (T, K), out (T, H). 0, or -1. The graph of the last call is used again where it fits.
int experts_forward(struct experts* e, int layer, int tokens, const float* x, const int32_t* ids, const float* weights,
                    float* out) {
  if ((e->graph_layer != layer || e->graph_tokens != tokens) && !build(e, layer, tokens)) return -1;
  ggml_backend_tensor_set(e->x, x, 0, ggml_nbytes(e->x));
  ggml_backend_tensor_set(e->ids, ids, 0, ggml_nbytes(e->ids));
  ggml_backend_tensor_set(e->weights, weights, 0, ggml_nbytes(e->weights));
  if (ggml_backend_graph_compute(e->backend, e->graph) != GGML_STATUS_SUCCESS) return -1;
  ggml_backend_tensor_get(e->out, out, 0, ggml_nbytes(e->out));
  return 0;
}

// The number of a type by the name that ggml gives it, -1 if it has none such.
int experts_type(const char* name) {
  for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
    const char* own = ggml_type_name((enum ggml_type)t);
    if (own && !strcmp(own, name)) return t;
  }
  return -1;
}
