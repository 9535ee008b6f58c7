"""Other projects' CPU experts, for cpu_experts_table.py: llama.cpp's ggml (or a fork of it), vLLM's and kt-kernel.

None is a dependency. ``--ggml INCLUDE,LIBRARIES`` names the headers and the built libraries of a ggml (pip download
the source of llama-cpp-python, then build ``ggml-base`` and ``ggml-cpu`` of its ``vendor/llama.cpp/ggml`` with cmake);
``--vllm FILE`` names the extension of vLLM's CPU wheel for this instruction set, such as ``vllm/_C_AVX2.abi3.so`` or,
with AMX, ``vllm/_C.abi3.so``, built for the torch that runs. ``--kt`` takes kt-kernel's wheel (pip install --no-deps
kt-kernel, and gguf).
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ktfx.formats import quantize, unpack_nibbles

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
Layers = list[dict[str, torch.Tensor]]

# Types by the names ggml gives them, with the buffer that llama.cpp would keep them in, "" for the plain one.
GGML_TYPES = (("bf16", ""), ("q8_0", ""), ("q4_0", "CPU_REPACK"))
# kt-kernel's experts by what they keep: the first of these names that the build for this CPU has. "int8" and "int4" are
# rounded by it with one scale a row; "int4-g32" and "fp8" have ktfx's codes and scales.
KT_TYPES = (
    ("bf16", ("AMXBF16_MOE", "AVX2BF16_MOE")),
    ("int8", ("AMXInt8_MOE",)),
    ("int4", ("AMXInt4_MOE",)),
    ("int4-g32", ("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE")),
    ("fp8", ("AMXFP8_MOE", "AVX2FP8_MOE")),
)
KT_MOST_TOKENS = 1024  # it keeps working memory for as many
# A fork whose types hold rows side by side needs no such buffer.
FORK_TYPES = ("bf16", "q8_0_r8", "q4_0_r8")


@dataclass(frozen=True)
class Foreign:
    """Another project's experts. bytes: of one expert's weights; forward takes x (T, H), ids, weights (T, K), layer."""

    name: str
    forward: Forward
    bytes: int


def ggml_library(include: Path, libraries: Path) -> ctypes.CDLL:
    """ggml_experts.c compiled against one ggml."""
    source = Path(__file__).with_name("ggml_experts.c")
    target = Path(tempfile.mkdtemp(prefix="ggml_experts_")) / "experts.so"
    fork = "ggml_moe_up_gate" in (include / "ggml.h").read_text()
    names = [n for n in ("ggml-cpu", "ggml-base", "ggml") if (libraries / f"lib{n}.so").exists()]
    command = ["cc", "-O2", "-shared", "-fPIC", str(source), f"-I{include}", f"-L{libraries}", "-o", str(target)]
    command += [f"-Wl,-rpath,{libraries}", *(f"-l{n}" for n in names), *(["-DGGML_FUSED_UP_GATE"] if fork else [])]
    subprocess.run(command, check=True)
    lib = ctypes.CDLL(str(target))
    lib.experts_new.restype = ctypes.c_void_p
    lib.experts_new.argtypes = [ctypes.c_int] * 5 + [ctypes.c_char_p]
    lib.experts_add.restype = ctypes.c_int64
    lib.experts_add.argtypes = [ctypes.c_void_p, ctypes.c_int] + [ctypes.c_void_p] * 3
    lib.experts_forward.argtypes = [ctypes.c_void_p] + [ctypes.c_int] * 2 + [ctypes.c_void_p] * 4
    lib.experts_type.argtypes = [ctypes.c_char_p]
    return lib


def ggml_experts(
    where: str, sizes: tuple[int, int, int, int], layers: Layers, threads: int, only: str = ""
) -> Iterator[Foreign]:
    """One contender for every type of weight. sizes: hidden, intermediate, experts, chosen. only: these types."""
    include, libraries, *label = where.split(",")
    lib = ggml_library(Path(include), Path(libraries))
    fork = lib.experts_type(b"q4_0_r8") >= 0
    wanted = [(t, "") for t in FORK_TYPES] if fork else list(GGML_TYPES)
    name = label[0] if label else "ggml fork" if fork else "ggml"
    for kind, buffer in wanted:
        number = lib.experts_type(kind.encode())
        if number < 0 or (only and kind.split("_r")[0] not in only.split(":")):
            continue
        state = lib.experts_new(*sizes, threads, buffer.encode())
        if not state:
            continue
        total = 0
        for layer in layers:
            gate, up = (t.float() for t in layer["gate_up"].chunk(2, dim=1))
            gate, up, down = gate.contiguous(), up.contiguous(), layer["down"].float()
            total = lib.experts_add(state, number, gate.data_ptr(), up.data_ptr(), down.data_ptr())
            del gate, up, down
        if not total:
            print(f"{name} {kind} {buffer} is left out: ggml keeps no such weights", flush=True)
            continue

        def forward(
            x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: int, state: int = state
        ) -> torch.Tensor:
            x32, ids32, weights32 = x.float(), ids.int(), weights.float().contiguous()
            out = torch.empty_like(x32)
            tensors = (t.data_ptr() for t in (x32, ids32, weights32, out))
            if lib.experts_forward(state, layer, x.shape[0], *tensors):
                raise RuntimeError("ggml could not compute the graph")
            return out.to(x.dtype)

        yield Foreign(f"{name} {kind}{', repacked' if buffer else ''}", forward, total // sizes[2])


def vllm_experts(where: str, layers: Layers, kernels: Iterable[str] = ("vec",)) -> Iterator[Foreign]:
    """vLLM's fused experts in bf16. kernels: ``vec``, and ``amx``, which only its file without a suffix has.

    It leaves asking the operating system for AMX's registers to others (an illegal instruction otherwise): ktfx's own
    library has to be loaded before.
    """
    torch.ops.load_library(where)
    for isa in kernels:
        prepacked = []
        for layer in layers:
            pair = []
            for weight in (layer["gate_up"], layer["down"]):
                out = torch.empty_like(weight)
                torch.ops._C.prepack_moe_weight(weight, out, isa)
                pair.append(out)
            prepacked.append(pair)

        def forward(
            x: torch.Tensor,
            ids: torch.Tensor,
            weights: torch.Tensor,
            layer: int,
            prepacked: list[list[torch.Tensor]] = prepacked,
            isa: str = isa,
        ) -> torch.Tensor:
            out = torch.empty_like(x)
            w13, w2 = prepacked[layer]
            torch.ops._C.cpu_fused_moe(out, x, w13, w2, None, None, weights.float(), ids.int(), False, "silu", isa)
            return out

        yield Foreign(f"vLLM bf16, {isa}", forward, sum(t[0].nbytes for t in layers[0].values()))


def kt_experts(sizes: tuple[int, int, int, int], layers: Layers, threads: int, only: str = "") -> Iterator[Foreign]:
    """One contender for every type of kt-kernel's that its build for this CPU has. sizes, only: as in ggml_experts.

    Raises ImportError where the wheel, or something it imports, is missing.
    """
    from kt_kernel import kt_kernel_ext as kt

    hidden, intermediate, experts, chosen = sizes
    workers = kt.WorkerPoolConfig()
    workers.subpool_count = 1
    workers.subpool_numa_map = [0]
    workers.subpool_thread_count = [threads]
    infer = kt.CPUInfer(workers)
    on_gpu = torch.zeros(experts, dtype=torch.bool)
    order = torch.arange(experts, dtype=torch.int64)
    for kind, names in KT_TYPES:
        made = next((found for name in names if (found := getattr(kt.moe, name, None))), None)
        if made is None or (only and kind not in only.split(":")):
            continue
        moes, kept = [], [infer, on_gpu, order]  # kept: what moes point to
        for number, layer in enumerate(layers):
            config = kt.moe.MOEConfig(experts, chosen, hidden, intermediate, on_gpu.data_ptr())
            config.layer_idx = number
            config.pool = infer.backend_
            config.max_len = KT_MOST_TOKENS
            parts = dict(zip(("gate", "up"), (t.contiguous() for t in layer["gate_up"].chunk(2, dim=1)), strict=True))
            parts["down"] = layer["down"]
            scales: dict[str, torch.Tensor] = {}
            if kind in ("int4-g32", "fp8"):
                for name, weight in parts.items():
                    rounded = quantize(weight, kind)
                    parts[name], scales[name] = rounded.tensors()
                    if kind != "fp8":  # neighbours share a byte
                        codes = unpack_nibbles(rounded.data)
                        parts[name] = (codes[..., ::2] | codes[..., 1::2] << 4).contiguous()
                config.quant_config.bits = 8 if kind == "fp8" else 4
                config.quant_config.group_size = rounded.group
                config.quant_config.zero_point = False
                kept += [*parts.values(), *scales.values()]  # read where they lie; the other types are copied
            for name, weight in parts.items():
                if kind in ("int8", "int4"):  # rounded from one block of memory
                    setattr(config, f"{name}_proj", weight.data_ptr())
                else:
                    setattr(config, f"{name}_projs", [[t.data_ptr() for t in weight]])
                if name in scales:
                    setattr(config, f"{name}_scales", [[t.data_ptr() for t in scales[name]]])
            moe = made(config)
            infer.submit(moe.load_weights_task(order.data_ptr()))
            infer.sync()
            moes.append(moe)

        def forward(
            x: torch.Tensor,
            ids: torch.Tensor,
            weights: torch.Tensor,
            layer: int,
            moes: list[object] = moes,
            kept: list[object] = kept,
        ) -> torch.Tensor:
            out, count = torch.empty_like(x), torch.tensor([x.shape[0]], dtype=torch.int32)
            pointers = (t.data_ptr() for t in (ids, weights, x, out))
            infer.submit(moes[layer].forward_task(count.data_ptr(), ids.shape[1], *pointers, False))
            infer.sync()
            return out

        size, row_scales = 3 * hidden * intermediate, 4 * (2 * intermediate + hidden)
        total = {"bf16": 2 * size, "int8": size + row_scales, "int4": size // 2 + row_scales}
        total |= {"int4-g32": size * 5 // 8, "fp8": size + size // 4096}
        yield Foreign(f"kt-kernel {kind}, {made.__name__}", forward, total[kind])
