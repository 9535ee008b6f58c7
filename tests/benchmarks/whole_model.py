"""A whole MoE model on one GPU: decode and prefill beside eager, torch.compile and reduce-overhead; prints a table.

    python tests/benchmarks/whole_model.py [--model qwen3] [--layers 8] [--batch 1] [--context 1024] [--contenders NAME]

The shape of Qwen3-30B-A3B, gpt-oss-20b or DeepSeek-V2-Lite with random bfloat16 weights made on the GPU. Decode: the
cache is filled by an eager prefill of ``context`` tokens, then steps of one token are timed, each to its end, and the
median is taken. The roofline is the bytes that a step must read (active experts, the rest of the layers, the head, the
cache's valid part) over the copy bandwidth that the same run measures. ``--tiny`` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter("ignore")

import torch  # noqa: E402

import ktfx  # noqa: E402

TRITON = {
    "ktfx": 1,
    "default_device": "cuda:0",
    "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.triton"}}],
}
# What merge_linears adds, in place of decode_linears: one more copy of q, k and v, and the vendor's products.
MERGED = {
    **TRITON,
    "passes": ["rewrite_experts", "match_patterns", "merge_linears", "fuse_attention", "fuse_router", "fuse_rope",
               "fuse_norms"],
}  # fmt: skip
INT4 = {
    **TRITON,
    "rules": [{"match": {"module": "experts"}, "replace": {"op": "experts.triton", "weights": "int4"}}],
}
EXPERTS_ONLY = {**TRITON, "passes": ["rewrite_experts"]}


@dataclass
class Shape:
    layers: int
    batch: int
    context: int
    tiny: bool
    steps: int = 40

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda:0"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(MODELS), default="qwen3")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=0, help="time a prefill of so many tokens too")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing after so long")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one ktfx step")
    parser.add_argument("--reference", action="store_true", help="errors against an eager float32 run (memory ×3)")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_grad_enabled(False)
    name = torch.cuda.get_device_name() if not args.tiny else "cpu"
    bandwidth = copy_bandwidth() if not args.tiny else 1e10
    print(f"{name}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    made = time.perf_counter()
    model = MODELS[args.model](args.layers, args.tiny)
    print(f"{args.model}, {args.layers} layers made in {time.perf_counter() - made:.0f} s", flush=True)
    for batch in args.batch:
        shape = Shape(args.layers, batch, args.context, args.tiny)
        floor = step_bytes(model, shape) / bandwidth * 1e3
        print(f"batch {batch}, context {args.context}: roofline {floor:.3f} ms a step", flush=True)
        reference = exact(model, shape) if args.reference else None
        for contender in args.contenders:
            if time.perf_counter() - start > 60 * args.minutes:
                print(f"  {contender:28} not started: time is up")
                continue
            reference = report(contender, CONTENDERS[contender], model, shape, floor, reference, args.profile)
    if args.prefill:
        prefills(model, args.prefill, args.tiny)


def report(
    name: str, make: Callable[[Any], Callable[..., Any]], model: Any, shape: Shape, floor: float | None, reference: Any,
    profile: bool,
) -> Any:  # fmt: skip
    """One line of the table; a contender that fails says why and the rest goes on. floor: the roofline in ms, if known.
    Returns the logits to compare with, the first where there were none.
    """
    began = time.perf_counter()
    try:
        ids = torch.arange(shape.context * shape.batch, device=shape.device).view(shape.batch, -1) % 997
        cache = filled_cache(model, ids, shape)
        step = make(model)
        logits, ms = decode(step, cache, shape)
        note = ""
        if reference is None:
            reference = logits
        else:
            error = float((logits - reference).norm() / reference.norm())
            note = f"  off the reference (float32, or the first) by {error:.1e}"
        took = time.perf_counter() - began
        share = "" if floor is None else f"  {floor / ms:5.0%} of the roofline"
        print(f"  {name:28} {ms:8.3f} ms{share}  ({took:.0f} s){note}", flush=True)
        if profile and name.startswith("ktfx") and not shape.tiny:
            kernels(step, cache, shape)
    except Exception as error:  # the table goes on
        print(f"  {name:28} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        traceback.print_exc(limit=4)
    finally:
        ktfx.restore(model)
        cache = step = None
        torch._dynamo.reset()
        gc.collect()
        if not shape.tiny:
            torch.cuda.empty_cache()
    return reference


def exact(model: Any, shape: Shape) -> torch.Tensor:
    """Logits (B, V) of the first decode step, by an eager float32 copy of the model."""
    import copy

    wide = copy.deepcopy(model).float()
    ids = torch.arange(shape.context * shape.batch, device=shape.device).view(shape.batch, -1) % 997
    cache = filled_cache(wide, ids, shape)
    token = torch.full((shape.batch, 1), 5, device=shape.device)
    return wide(input_ids=token, past_key_values=cache, use_cache=True).logits.float()[:, -1].clone()


def qwen3(layers: int, tiny: bool) -> Any:
    """Qwen3-30B-A3B's shape (transformers' published config), or a small one."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    }  # fmt: skip
    if tiny:
        sizes |= {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "vocab_size": 1000, "head_dim": 16,
                  "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=layers, norm_topk_prob=True, rope_theta=1e6, intermediate_size=6144,
        max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(Qwen3MoeForCausalLM, config, tiny)


def gpt_oss(layers: int, tiny: bool) -> Any:
    """gpt-oss-20b's shape (its published config), or a small one; sinks and biases are not zero."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
    }  # fmt: skip
    if tiny:
        sizes |= {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000}  # fmt: skip
    config = GptOssConfig(**sizes, num_hidden_layers=layers, sliding_window=128, tie_word_embeddings=False)
    return random_model(GptOssForCausalLM, config, tiny)


def deepseek_v2_lite(layers: int, tiny: bool) -> Any:
    """DeepSeek-V2-Lite's shape (its published config; the first layer is dense), or a small one."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 2048, "moe_intermediate_size": 1408, "intermediate_size": 10944, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 102400,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip
    if tiny:
        sizes |= {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96, "n_routed_experts": 8,
                  "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
                  "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
    config = DeepseekV2Config(
        **sizes, num_hidden_layers=layers, q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=1,
        topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0, max_position_embeddings=32768,
        tie_word_embeddings=False,
    )  # fmt: skip
    return random_model(DeepseekV2ForCausalLM, config, tiny)


def random_model(kind: Any, config: Any, tiny: bool) -> Any:
    """A model with random bfloat16 weights, made where it runs."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = kind(config).eval()
    finally:
        torch.set_default_dtype(before)
    device = torch.device("cpu" if tiny else "cuda")
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its table was on meta
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    return model


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device copy of 1 GiB."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * a.numel() / (statistics.median(times) * 1e-3)


def step_bytes(model: Any, shape: Shape) -> float:
    """What a decode step has to read at least: the experts chosen (on average), the rest, the cache."""
    config = model.config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    E, K = next(getattr(config, n) for n in names if hasattr(config, n)), config.num_experts_per_tok
    different = E * (1 - (1 - K / E) ** shape.batch)
    total = 0.0
    for name, parameter in model.named_parameters():
        nbytes = parameter.numel() * parameter.element_size()
        if ".experts." in name:
            total += nbytes * different / E
        elif "embed_tokens" not in name:
            total += nbytes
    return total + 2.0 * shape.batch * sum(cached_values(config, shape.context))


def cached_values(config: Any, context: int) -> list[int]:
    """Numbers that a token's attention has to read of its sequence's cache, for each layer."""
    if getattr(config, "kv_lora_rank", None):
        return [(config.kv_lora_rank + config.qk_rope_head_dim) * context] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    seen = [min(context, config.sliding_window) if kind == "sliding_attention" else context for kind in kinds]
    return [2 * config.num_key_value_heads * config.head_dim * length for length in seen]


def filled_cache(model: Any, ids: torch.Tensor, shape: Shape) -> Any:
    """A static cache, filled by the model's own eager prefill."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=shape.context + 4 * shape.steps)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode(step: Callable[..., Any], cache: Any, shape: Shape) -> tuple[torch.Tensor, float]:
    """Logits (B, V) of the first step in float32, and the median milliseconds of a step."""
    token = torch.full((shape.batch, 1), 5, device=shape.device)
    first = step(token, cache).float()[:, -1].clone()
    times = []
    for i in range(shape.steps):
        wait(shape)
        start = time.perf_counter()
        step(token, cache)
        wait(shape)
        if i >= 10:
            times.append(time.perf_counter() - start)
    return first, 1e3 * statistics.median(times)


def wait(shape: Shape) -> None:
    if not shape.tiny:
        torch.cuda.synchronize()


def kernels(step: Callable[..., Any], cache: Any, shape: Shape) -> None:
    """The kernels of one step, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    token = torch.full((shape.batch, 1), 5, device=shape.device)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        for _ in range(3):
            step(token, cache)
        torch.cuda.synchronize()
    rows = [e for e in run.key_averages() if e.self_device_time_total > 0]
    rows.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows) / 3
    print(f"    kernels of one step: {sum(e.count for e in rows) // 3}, {total / 1e3:.3f} ms")
    for e in rows[:22]:
        print(f"    {e.self_device_time_total / 3:9.1f} µs {e.count // 3:5} × {e.key[:100]}", flush=True)


# -- the contenders: each takes the model and returns step(token, cache) → logits
def eager(implementation: str) -> Callable[[Any], Callable[..., Any]]:
    def make(model: Any) -> Callable[..., Any]:
        model.config._experts_implementation = implementation
        return lambda token, cache: model(input_ids=token, past_key_values=cache, use_cache=True).logits

    return make


def torch_compile(mode: str | None) -> Callable[[Any], Callable[..., Any]]:
    def make(model: Any) -> Callable[..., Any]:
        model.config._experts_implementation = "grouped_mm"
        compiled = torch.compile(model.forward, mode=mode)

        def step(token: torch.Tensor, cache: Any) -> torch.Tensor:
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            return compiled(input_ids=token, past_key_values=cache, use_cache=True).logits

        return step

    return make


def by_ktfx(rules: Any, **options: Any) -> Callable[[Any], Callable[..., Any]]:
    def make(model: Any) -> Callable[..., Any]:
        simulate = "cpu" if model.device.type == "cpu" else None
        ktfx.compile(model, rules, simulate=simulate, **options)
        return lambda token, cache: model(input_ids=token, past_key_values=cache, use_cache=True).logits

    return make


CONTENDERS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "eager, grouped_mm": eager("grouped_mm"),
    "torch.compile": torch_compile(None),
    "torch.compile reduce-overhead": torch_compile("reduce-overhead"),
    "ktfx": by_ktfx(TRITON),
    "ktfx int4 experts": by_ktfx(INT4),
    "ktfx merge_linears": by_ktfx(MERGED),
    "ktfx experts only": by_ktfx(EXPERTS_ONLY),
    "ktfx no CUDA graphs": by_ktfx(TRITON, cuda_graphs=False),
}


MODELS: dict[str, Callable[[int, bool], Any]] = {
    "qwen3": qwen3, "gpt-oss": gpt_oss, "deepseek-v2-lite": deepseek_v2_lite,
}  # fmt: skip


def prefills(model: Any, tokens: int, tiny: bool) -> None:
    """Milliseconds of a prefill, eager and through ktfx, into a fresh cache each time."""
    from transformers import StaticCache

    device = "cpu" if tiny else "cuda:0"
    ids = torch.arange(tokens, device=device).view(1, -1) % 997
    for name, make in (("eager, grouped_mm", None), ("ktfx", by_ktfx(TRITON))):
        try:
            if make is not None:
                make(model)
            cache = StaticCache(config=model.config, max_cache_len=tokens + 8)
            times = []
            for i in range(6):
                cache.reset()
                if not tiny:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                if not tiny:
                    torch.cuda.synchronize()
                if i >= 3:
                    times.append(time.perf_counter() - start)
            print(f"  prefill of {tokens}: {name:20} {1e3 * statistics.median(times):8.1f} ms", flush=True)
        except Exception as error:  # the table goes on
            print(f"  prefill {name} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        finally:
            ktfx.restore(model)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
