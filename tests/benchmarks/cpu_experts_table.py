"""One table for one machine: the CPU experts in every format beside transformers' own, checked first, then timed.

    python3 setup.py build_ext --inplace
    python3 tests/benchmarks/cpu_experts_table.py [--quick] [--shapes qwen3,v2lite,v3,mixtral] [--json FILE]

Contenders take turns call by call in one run; figures are medians. A turn begins with a pause and calls that are not
timed, where calls are short: threads of the one before may still spin, its own sleep, and clocks are down. So is the
reading that shares are counted by. Layers are rotated and every call chooses other experts, so that weights come from
memory. Other projects' kernels: see cpu_contenders.py. ``share`` is the bytes of the chosen experts, scales included,
over the time and over the read bandwidth measured between the same calls, by the faster of two loops; ``of peak`` is
over the multiply-add rate measured so. ``--one-core`` runs all on one thread and counts CPU time, for a machine that
others use too. kt-kernel's threads spin all the time and slow the others and the reading, so it is best timed in a
process of its own (``--kt --no-transformers --formats ""``), its ``share`` left aside.
``error`` is relative to the float32 reference over the unquantised weights, so it holds the format's own rounding.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cpu_contenders

from ktfx.cpu_kernels import library
from ktfx.ops import experts_native as native
from ktfx.ops.experts import ExpertsSpec, reference_experts
from ktfx.ops.experts_cpu import activations_used, aten_experts, cpu_kernels_status


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    chosen: int


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8),  # Qwen3-30B-A3B
    "v2lite": Shape(2048, 1408, 64, 6),  # DeepSeek-V2-Lite
    "v3": Shape(7168, 2048, 16, 8),  # DeepSeek-V3, 16 of its 256 experts
    "mixtral": Shape(4096, 14336, 8, 2),
    "mixtral4": Shape(4096, 14336, 4, 2),  # half of its experts, where memory is short
}
FORMATS = ["model", "fp8", "int8", "int4", "int4+int8", "int4zp", "mxfp4"]  # "+int8": activations may be int8
CLOCK = time.CLOCK_MONOTONIC  # --one-core: CPU time


def now(own_threads: bool = False) -> float:
    counted = own_threads and CLOCK == time.CLOCK_THREAD_CPUTIME_ID
    return time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID if counted else CLOCK)


SHORT_CALL = 0.1  # seconds: calls below are preceded by a pause and by calls that are not timed
WARM = 0.03  # seconds of such calls: after a pause cores and memory take some time to their full clock
READ_PIECE = 128 << 20  # bytes
PAUSE = 0.006  # seconds: as long as idle OpenMP threads spin
MOST_BATCHED = 16  # tokens: batched_mm copies the weights of every choice


@dataclass
class Contender:
    """call(x, ids, weights, layer). bytes: of one expert's weights. error is filled by the check.

    own_threads: it works on threads of its own, so that where CPU time is counted all of the process's is.
    """

    name: str
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    bytes: int
    most_tokens: int = 1 << 30
    error: float = 0.0
    note: str = ""
    own_threads: bool = False


@dataclass
class Row:
    shape: str
    tokens: int
    name: str
    ms: float
    share: float
    gflops: float
    of_peak: float
    error: float
    rounds: int  # calls
    note: str = ""


@dataclass
class Limits:
    """Bytes and float operations a second, one value for every round. read and fetched: two ways of reading."""

    read: list[float] = field(default_factory=list)
    fetched: list[float] = field(default_factory=list)
    fma: list[float] = field(default_factory=list)

    def bandwidth(self) -> float:
        """The read bandwidth: the faster way's median."""
        return max(statistics.median(self.read), statistics.median(self.fetched))


def spec_of(shape: Shape, fmt: str) -> ExpertsSpec:
    weights, _, activations = fmt.partition("+")
    return ExpertsSpec(
        shape.experts, shape.hidden, shape.intermediate, weights=weights, activations=activations or "model"
    )


def random_weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """bf16 weights; a few experts' worth of random numbers is repeated, since drawing them all takes longer."""
    g = torch.Generator().manual_seed(seed)
    E, H, inter = shape.experts, shape.hidden, shape.intermediate
    few = min(E, 4)

    def draw(rows: int, columns: int) -> torch.Tensor:
        block = (torch.randn(few, rows, columns, generator=g) * columns**-0.5).bfloat16()
        return block.repeat(-(-E // few), 1, 1)[:E].contiguous()

    return {"gate_up": draw(2 * inter, H), "down": draw(H, inter)}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def inputs(shape: Shape, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, generator=g).bfloat16()
    ids = torch.rand(tokens, shape.experts, generator=g).argsort(dim=1)[:, : shape.chosen].contiguous()
    weights = torch.rand(tokens, shape.chosen, generator=g)
    return x, ids, weights / weights.sum(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------


def check_kernels() -> bool:
    """Every format on every instruction set of this machine against the reference; prints what is wrong."""
    good, in_force = True, native.lib().ktfx_isa().decode()
    for isa in native.isas():
        native.set_isa(isa)
        worst = 0.0
        for fmt in [*FORMATS, "int4-g32", "int4-g128"]:
            for E, H, inter, tokens, chosen in ((5, 96, 80, 3, 2), (3, 257, 130, 70, 2), (2, 1100, 560, 40, 1)):
                spec = spec_of(Shape(H, inter, E, chosen), fmt)
                tensors = random_weights(Shape(H, inter, E, chosen), 1)
                packed = native.pack(spec, tensors)
                x, ids, weights = inputs(Shape(H, inter, E, chosen), tokens, 2)
                want = reference_experts(spec, x.float(), ids, weights, native.dequantised(spec, packed))
                error = relative_error(native.forward(spec, x, ids, weights, packed), want)
                limit = 1.2e-2 if "+" in fmt else 6e-3
                worst = max(worst, error if "+" not in fmt else 0.0)
                if not error < limit:
                    good = False
                    print(f"WRONG: {isa} {fmt} H={H} I={inter} T={tokens}: relative error {error:.2e}", flush=True)
        print(f"checked {isa}: largest error {worst:.1e} (bf16 in and out)", flush=True)
    native.set_isa(in_force)
    return good


# ---------------------------------------------------------------------------------------------------------------------


def native_contenders(shape: Shape, layers: list[dict[str, torch.Tensor]], formats: list[str]) -> list[Contender]:
    out = []
    for fmt in formats:
        spec = spec_of(shape, fmt)
        packed = [native.pack(spec, layer) for layer in layers]

        def call(
            x: torch.Tensor,
            ids: torch.Tensor,
            weights: torch.Tensor,
            layer: int,
            spec: ExpertsSpec = spec,
            packed: list[list[torch.Tensor]] = packed,
        ) -> torch.Tensor:
            return native.forward(spec, x, ids, weights, packed[layer])

        size = sum(p.shape[1] for p in packed[0][:2])
        name = "ktfx bf16" if fmt == "model" else f"ktfx {fmt}"
        out.append(Contender(name, call, size, note=f"x as {activations_used(spec)}"))
    return out


def transformers_contenders(shape: Shape, layers: list[dict[str, torch.Tensor]]) -> list[Contender]:
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        print(f"transformers is left out: {error}", flush=True)
        return []
    out = []
    for how, most in (("eager", 1 << 30), ("batched_mm", MOST_BATCHED), ("grouped_mm", 1 << 30)):
        try:
            config = Qwen3MoeConfig(
                hidden_size=shape.hidden,
                moe_intermediate_size=shape.intermediate,
                num_experts=shape.experts,
                num_experts_per_tok=shape.chosen,
            )
            config._experts_implementation = how
            modules = []
            for layer in layers:
                with torch.device("meta"):
                    module = Qwen3MoeExperts(config)
                module.gate_up_proj = torch.nn.Parameter(layer["gate_up"], requires_grad=False)
                module.down_proj = torch.nn.Parameter(layer["down"], requires_grad=False)
                modules.append(module)
        except Exception as error:
            print(f"transformers {how} is left out: {error}", flush=True)
            continue

        def call(
            x: torch.Tensor,
            ids: torch.Tensor,
            weights: torch.Tensor,
            layer: int,
            modules: list[torch.nn.Module] = modules,
        ) -> torch.Tensor:
            return modules[layer](x, ids, weights.to(x.dtype))

        size = sum(t[0].nbytes for t in layers[0].values())
        out.append(Contender(f"transformers {how}", call, size, most))
    return out


def foreign_contenders(
    shape: Shape,
    layers: list[dict[str, torch.Tensor]],
    ggml: list[str],
    ggml_types: str,
    vllm: str,
    kt: tuple[int, str] | None,
) -> list[Contender]:
    """Other projects' experts, where the command line names them. kt: kt-kernel's threads (0: like ktfx), types."""
    found = []
    sizes = (shape.hidden, shape.intermediate, shape.experts, shape.chosen)
    if vllm:
        kernels = ("vec", "amx") if "amx" in native.isas() and "_AVX" not in vllm else ("vec",)
        found += cpu_contenders.vllm_experts(vllm, layers, kernels)
    for where in ggml:
        found += cpu_contenders.ggml_experts(where, sizes, layers, native.lib().ktfx_threads(), ggml_types)
    if kt:
        try:
            found += cpu_contenders.kt_experts(sizes, layers, kt[0] or native.lib().ktfx_threads(), kt[1])
        except ImportError as error:
            print(f"kt-kernel is left out: {error}", flush=True)
    return [Contender(f.name, f.forward, f.bytes, own_threads=True) for f in found]


def aten_contender(shape: Shape, layers: list[dict[str, torch.Tensor]]) -> Contender:
    spec = spec_of(shape, "model")
    size = sum(t[0].nbytes for t in layers[0].values())

    def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
        # Without the rounding of weights that aten_experts does for quantised formats there is nothing to convert.
        return aten_experts(spec, x, ids, weights, [layers[layer]["gate_up"], layers[layer]["down"]])

    return Contender("ktfx without its library", call, size, MOST_BATCHED)


def measure(
    name: str,
    shape: Shape,
    contenders: list[Contender],
    tokens: int,
    layers: int,
    seconds: float,
    sink: torch.Tensor,
    limits: Limits,
) -> list[Row]:
    """Rounds of one call each until the time is spent, at least three."""
    lib = native.lib()
    sets = [inputs(shape, tokens, 100 + i) for i in range(7)]
    active = [len(torch.unique(ids)) for _, ids, _ in sets]
    ready = [c for c in contenders if tokens <= c.most_tokens]
    times: dict[str, list[float]] = {c.name: [] for c in ready}
    bytes_read: dict[str, list[float]] = {c.name: [] for c in ready}
    local = Limits()
    slow = set()  # so slow that two calls have to do
    short = set()
    for contender in list(ready):
        start = now(contender.own_threads)
        try:
            contender.call(*sets[0], 0)
        except Exception as error:
            print(f"{contender.name} is left out at {tokens} tokens: {error}", flush=True)
            ready.remove(contender)
        took = now(contender.own_threads) - start
        if took > seconds / 6:
            slow.add(contender.name)
        if took < SHORT_CALL:
            short.add(contender.name)
    begin, rounds = time.monotonic(), 0
    while rounds < 3 or (time.monotonic() - begin < seconds and rounds < 200):
        which, layer = rounds % len(sets), rounds % layers
        time.sleep(PAUSE)
        pieces = sink.split(READ_PIECE)[: max(1, sink.numel() // READ_PIECE)]
        warm, at = time.monotonic() + WARM, rounds * 3
        while time.monotonic() < warm:
            at += 1
            lib.ktfx_measure_read(pieces[at % len(pieces)].data_ptr(), pieces[0].numel(), at % 2)
        for fetch, ways in ((0, local.read), (1, local.fetched)):
            at += 1
            piece = pieces[at % len(pieces)]  # not what was read last: it may lie in a large cache
            start = now()
            lib.ktfx_measure_read(piece.data_ptr(), piece.numel(), fetch)
            ways.append(piece.numel() / (now() - start))
        if rounds % 4 == 0:
            wall, start = time.monotonic(), now()
            local.fma.append(lib.ktfx_measure_fma() * (time.monotonic() - wall) / (now() - start))
        for contender in ready:
            if rounds >= 2 and contender.name in slow:
                continue
            if contender.name in short:
                time.sleep(PAUSE)
                warm, i = time.monotonic() + WARM, 0
                while i == 0 or time.monotonic() < warm:
                    i += 1
                    contender.call(*sets[(which + 1 + i % (len(sets) - 1)) % len(sets)], (layer + i) % layers)
            start = now(contender.own_threads)
            contender.call(*sets[which], layer)
            times[contender.name].append(now(contender.own_threads) - start)
            bytes_read[contender.name].append(active[which] * contender.bytes)
        rounds += 1
    limits.read += local.read
    limits.fetched += local.fetched
    limits.fma += local.fma
    read, fma = local.bandwidth(), statistics.median(local.fma)
    work = 6 * shape.hidden * shape.intermediate * shape.chosen * tokens
    rows = []
    for c in ready:
        t = statistics.median(times[c.name])
        share = statistics.median(b / s for b, s in zip(bytes_read[c.name], times[c.name], strict=True)) / read
        count = len(times[c.name])
        rows.append(Row(name, tokens, c.name, t * 1e3, share, work / t / 1e9, work / t / fma, c.error, count, c.note))
    return rows


def print_rows(rows: list[Row], read: float, fma: float, matmul: float) -> None:
    print(
        f"\n| {rows[0].shape}, {rows[0].tokens} tokens | ms | share | GFLOP/s | of peak | of matmul | error | rounds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r.name} | {r.ms:.2f} | {r.share:.2f} | {r.gflops:.0f} | {r.of_peak:.2f} "
            f"| {r.gflops * 1e9 / matmul:.2f} | {r.error:.1e} | {r.rounds} |"
        )
    print(f"(reading {read / 1e9:.1f} GB/s, multiply-add {fma / 1e9:.0f} GFLOP/s)", flush=True)


def torch_matmul_rate(amx: bool) -> float:
    """Float operations a second of torch's own bf16 matmul, 4096³ where AMX makes that quick, else 1024³."""
    n = 4096 if amx else 1024
    a, b = (torch.randn(n, n).bfloat16() for _ in range(2))
    torch.mm(a, b)
    times = []
    for _ in range(5 if amx else 3):
        start = now()
        torch.mm(a, b)
        times.append(now() - start)
    return 2 * n**3 / statistics.median(times)


def packing(shape: Shape, weights: dict[str, torch.Tensor], formats: list[str]) -> dict[str, float]:
    """Source bytes a second of packing into memory that is new, and of torch's copy into new memory for comparison."""
    source = sum(t.nbytes for t in weights.values())
    out = {}

    def rate(run: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = now()
            run()
            times.append(now() - start)
        return source / statistics.median(times)

    out["copy into new memory"] = rate(lambda: [t.clone() for t in weights.values()])
    pairs = [(torch.empty_like(t).zero_(), t) for t in weights.values()]
    out["copy into memory in use"] = rate(lambda: [into.copy_(t) for into, t in pairs])
    pairs.clear()
    for fmt in formats:
        if "+" not in fmt:
            out[fmt] = rate(lambda fmt=fmt: native.pack(spec_of(shape, fmt), weights))
    for name, value in out.items():
        print(f"packing {name}: {value / 1e9:.1f} GB/s of source", flush=True)
    return out


def breakdown(shape: Shape, weights: dict[str, torch.Tensor], formats: list[str], read: float) -> None:
    """Where a call's time goes: one line for a format and a number of tokens, in microseconds, means of many calls.

    outside: Python and the C call's own preparation. begin and wait: how late threads began, and how long they waited
    for the last one, as means over the threads; idle: threads that took no task. GB/s: weights over the step's time.
    """
    lib = native.lib()
    print(f"\nbreakdown, us a call (read {read / 1e9:.0f} GB/s, {lib.ktfx_threads()} threads, {huge_pages()})")
    for fmt in formats:
        spec = spec_of(shape, fmt)
        packed = [native.pack(spec, weights) for _ in range(2)]
        sums = (ctypes.c_double * library.PROFILE_SUMS)()
        for tokens in (1, 4, 16):
            sets = [inputs(shape, tokens, i) for i in range(7)]
            active = [len(torch.unique(ids)) for _, ids, _ in sets]
            rounds = max(8, min(100, int(0.5e9 / (active[0] * sum(p.shape[1] for p in packed[0][:2])) * 10)))
            for i in range(3):
                native.forward(spec, *sets[i], packed[i % 2])
            lib.ktfx_profile(1, None)
            start = time.monotonic()
            for i in range(rounds):
                native.forward(spec, *sets[i % 7], packed[i % 2])
            whole = (time.monotonic() - start) / rounds * 1e6
            lib.ktfx_profile(0, sums)
            us = [s / max(1.0, sums[0]) * 1e6 for s in sums]
            mean = statistics.mean(active[i % 7] for i in range(rounds))
            rate = [mean * p.shape[1] / max(t, 1e-3) / 1e3 for p, t in zip(packed[0][:2], (us[2], us[6]), strict=True)]
            print(
                f"{fmt} {tokens}t {whole:.0f}: outside {whole - us[1] - us[2] - us[6] - us[10]:.0f}, sort {us[1]:.0f}, "
                f"up {us[2]:.0f} ({rate[0]:.0f} GB/s, begin {us[3]:.0f} wait {us[4]:.0f} idle {us[5] / 1e6:.2f}), "
                f"down {us[6]:.0f} ({rate[1]:.0f} GB/s, begin {us[7]:.0f} wait {us[8]:.0f} idle {us[9] / 1e6:.2f})",
                flush=True,
            )


def huge_pages() -> str:
    """How much of this process lies in huge pages, and what the kernel's setting is."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
        huge = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("AnonHugePages"))
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
        return f"{huge / 1e6:.1f} GB in huge pages, {setting}"
    except (OSError, StopIteration):
        return "huge pages not known"


def sweep_ahead(shape: Shape, weights: dict[str, torch.Tensor]) -> None:
    """How far ahead weights are best fetched; rounds take turns, medians."""
    distances = (256, 512, 1024, 2048, 4096, 8192)
    for fmt in ("model", "int8", "int4"):
        spec = spec_of(shape, fmt)
        packed = [native.pack(spec, weights) for _ in range(2)]
        for tokens in (1, 16):
            sets = [inputs(shape, tokens, i) for i in range(5)]
            times: dict[int, list[float]] = {d: [] for d in distances}
            for i in range(40 if tokens == 1 else 12):
                for j, distance in enumerate(distances):  # never the experts of the call before: a cache may hold them
                    native.lib().ktfx_set_ahead(distance)
                    start = now()
                    native.forward(spec, *sets[(i + j) % 5], packed[i % 2])
                    times[distance].append(now() - start)
            found = ", ".join(f"{d} B {statistics.median(t) * 1e3:.2f}" for d, t in times.items())
            print(f"{fmt} {tokens}t, ms by distance fetched ahead: {found}", flush=True)
    native.lib().ktfx_set_ahead(0)


def sweep_threads(shape: Shape, weights: dict[str, torch.Tensor]) -> None:
    """Where the machine has more logical CPUs than cores: which number of threads does better."""
    spec = spec_of(shape, "model")
    packed = native.pack(spec, weights)
    default = native.lib().ktfx_threads()
    for threads in sorted({default, os.cpu_count() or default, max(1, default - 1)}):
        native.set_threads(threads, 0)
        line = [f"{threads} threads:"]
        for tokens in (1, 16, 1024):
            sets = [inputs(shape, tokens, i) for i in range(5)]
            times = []
            for i in range(15 if tokens < 1000 else 5):
                start = now()
                native.forward(spec, *sets[i % 5], packed)
                times.append(now() - start)
            line.append(f"{tokens} tokens {statistics.median(times) * 1e3:.2f} ms,")
        print(*line, flush=True)
    native.set_threads(0, 0)


def sweep_amx_rows(shape: Shape, weights: dict[str, torch.Tensor]) -> None:
    """From how many rows of an expert on AMX is the faster way."""
    for fmt in ("model", "int4"):
        spec = spec_of(shape, fmt)
        packed = native.pack(spec, weights)
        for tokens in (32, 64, 128, 256):
            sets = [inputs(shape, tokens, i) for i in range(5)]
            line = [f"{fmt}, {tokens} tokens:"]
            for rows in (2, 4, 8, 16, 1000):
                native.lib().ktfx_set_amx_rows(rows)
                times = []
                for i in range(6):
                    start = now()
                    native.forward(spec, *sets[i % 5], packed)
                    times.append(now() - start)
                line.append(f"AMX from {rows} rows {statistics.median(times) * 1e3:.2f} ms,")
            print(*line, flush=True)
    native.lib().ktfx_set_amx_rows(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, little time a line (about two minutes)")
    parser.add_argument("--shapes", default="", help="comma-separated: " + ", ".join(SHAPES))
    parser.add_argument("--tokens", default="", help="comma-separated, default 1,4,16,128,1024")
    parser.add_argument("--formats", default=",".join(FORMATS), help='ktfx\'s; "" leaves ktfx out')
    parser.add_argument("--seconds", type=float, default=0.0, help="time for one number of tokens")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--kt", action="store_true", help="kt-kernel too, where its wheel is installed")
    parser.add_argument("--kt-threads", type=int, default=0, help="its threads, where not as many as ktfx's")
    parser.add_argument("--kt-types", default="", help="colon-separated, such as bf16:int8; default all")
    parser.add_argument("--ggml", action="append", default=[], metavar="INCLUDE,LIBRARIES[,NAME]")
    parser.add_argument("--ggml-types", default="", help="colon-separated, such as bf16:q4_0; default all")
    parser.add_argument("--vllm", default="", metavar="FILE", help="the extension of vLLM's CPU wheel")
    parser.add_argument("--no-packing", action="store_true")
    parser.add_argument("--no-batched", action="store_true", help="transformers' eager and grouped_mm only")
    parser.add_argument("--no-sweeps", action="store_true", help="the table only")
    parser.add_argument("--one-core", action="store_true", help="one thread, CPU time: for a machine in use")
    parser.add_argument("--layers", type=int, default=2, help="layers to rotate over")
    parser.add_argument("--json", default="", help="write the rows there")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.one_core:
        global CLOCK
        CLOCK = time.CLOCK_THREAD_CPUTIME_ID
        torch.set_num_threads(1)
        native.set_threads(1, 1)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    print(f"{cpu_kernels_status()}; instruction sets {', '.join(native.isas())}", flush=True)
    if not check_kernels():
        print("the kernels are WRONG on this machine; the figures below are of wrong results", flush=True)
    amx = native.lib().ktfx_isa() == b"amx"
    matmul = torch_matmul_rate(amx)
    print(f"torch bf16 matmul: {matmul / 1e9:.0f} GFLOP/s ({torch.get_num_threads()} threads)", flush=True)
    names = args.shapes.split(",") if args.shapes else ["qwen3"] if args.quick else list(SHAPES)
    counts = [int(t) for t in args.tokens.split(",")] if args.tokens else [1, 4, 16, 128, 1024]
    formats = [f for f in args.formats.split(",") if f]
    seconds = args.seconds or (4.0 if args.quick else 15.0)
    rows: list[Row] = []
    limits = Limits()
    packs = {}
    for name in names:
        shape = SHAPES[name]
        layers = [random_weights(shape, i) for i in range(args.layers)]
        contenders = native_contenders(shape, layers, formats)
        if not args.no_transformers:
            contenders += [*transformers_contenders(shape, layers), aten_contender(shape, layers)]
        kt = (args.kt_threads, args.kt_types) if args.kt else None
        contenders += foreign_contenders(shape, layers, args.ggml, args.ggml_types, args.vllm, kt)
        if args.no_batched:
            contenders = [c for c in contenders if "batched" not in c.name and "without" not in c.name]
        x, ids, weights = inputs(shape, 2, 3)
        used, renumbered = ids.unique(return_inverse=True)
        wide = {k: t[used].float() for k, t in layers[0].items()}
        few = ExpertsSpec(len(used), shape.hidden, shape.intermediate)
        want = reference_experts(few, x.float(), renumbered, weights, wide)
        for c in contenders:
            c.error = relative_error(c.call(x, ids, weights, 0), want)
        del wide
        # Read as the kernels do: from memory placed and paged like the packed weights. As much of it as there is: a
        # last-level cache of 300 MiB held most of 400 MB that were read in turns.
        sink = native.pack(spec_of(shape, "model"), layers[0])[0].view(-1)
        for tokens in counts:
            done = measure(name, shape, contenders, tokens, len(layers), seconds, sink, limits)
            print_rows(done, limits.bandwidth(), statistics.median(limits.fma), matmul)
            rows += done
        if name == names[0]:
            packs = {} if args.no_packing else packing(shape, layers[0], formats)
            if not args.no_sweeps:
                if amx and not args.one_core:
                    sweep_threads(shape, layers[0])
                    sweep_amx_rows(shape, layers[0])
                sweep_ahead(shape, layers[0])
                some = [f for f in ("model", "int8", "int4") if f in formats]
                breakdown(shape, layers[0], some, limits.bandwidth())
        del contenders, layers, sink
    if args.json:
        data = {
            "status": str(cpu_kernels_status()),
            "matmul": matmul,
            "read": limits.read,
            "fetched": limits.fetched,
            "fma": limits.fma,
            "packing": packs,
            "rows": [asdict(r) for r in rows],
        }
        Path(args.json).write_text(json.dumps(data, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
