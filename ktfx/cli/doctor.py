"""``ktfx doctor``: what this machine and installation have, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ktfx.cli import common
from ktfx.text import human_bytes

_LIBRARIES = ("torch", "transformers", "triton", "safetensors", "pyyaml", "typer", "rich", "accelerate")
_OPTIONAL = ("triton", "accelerate")
_X86_SETS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
)
_ARM_SETS = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")
_MEASURED_BYTES = 256 * 2**20


class Status(StrEnum):
    """ok; warn: works, but less well than it could; missing: something will fail."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


@dataclass(frozen=True)
class Check:
    """One line. data: the same as plain values, for ``--json``."""

    section: str
    name: str
    status: Status
    value: str
    mend: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@common.guarded
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure copy bandwidth between the host and each GPU, and between GPUs.")
    ] = False,
    as_json: common.Json = False,
    debug: common.Debug = False,
) -> None:
    """Check the installation and the machine. Exit code 1 if something that ktfx needs is missing."""
    checks = _software()
    if find_spec("torch") is not None:
        checks += [*_host(), *_gpus(measure)]
    missing = [check for check in checks if check.status is Status.MISSING]
    if as_json:
        common.print_json({"ok": not missing, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks)
    if missing:
        raise typer.Exit(common.Exit.NO)


# ---- software


def _software() -> list[Check]:
    ranges = _supported_ranges()
    found = [_version_check("python", platform.python_version(), ranges.get("python"))]
    found.append(
        Check("software", "ktfx", Status.OK, metadata.version("ktfx"), data={"version": metadata.version("ktfx")})
    )
    for name in _LIBRARIES:
        try:
            found.append(_version_check(name, _version(name), ranges.get(name)))
        except metadata.PackageNotFoundError:
            found.append(_absent(name, ranges.get(name)))
    found.append(_compiler())
    return found


def _version(name: str) -> str:
    """The installed version; torch's own text says for which CUDA it was built, its metadata may not."""
    version = metadata.version(name)
    if name == "torch" and find_spec("torch") is not None:
        import torch

        return str(torch.__version__)
    return version


def _supported_ranges() -> dict[str, str]:
    """Library → the range that ktfx's own metadata asks for."""
    from packaging.requirements import Requirement

    about = metadata.metadata("ktfx")
    ranges = {"python": about["Requires-Python"]} if "Requires-Python" in about else {}
    for text in metadata.requires("ktfx") or []:
        requirement = Requirement(text)
        ranges.setdefault(requirement.name.lower(), str(requirement.specifier))
    return ranges


def _version_check(name: str, version: str, supported: str | None) -> Check:
    from packaging.specifiers import SpecifierSet

    data = {"version": version, "supported": supported}
    if supported and not SpecifierSet(supported).contains(version.split("+")[0], prereleases=True):
        if name == "python":
            mend = "make a virtual environment with a Python in that range"
        else:
            mend = f"pip install '{name}{supported}'"
        return Check("software", name, Status.MISSING, f"{version}, ktfx supports {supported}", mend, data)
    return Check("software", name, Status.OK, version + (f"  ({supported})" if supported else ""), data=data)


def _absent(name: str, supported: str | None) -> Check:
    status = Status.WARN if name in _OPTIONAL else Status.MISSING
    uses = {"triton": "experts.triton needs it", "accelerate": "only its device maps need it"}
    value = "not installed" + (f"; {uses[name]}" if name in uses else "")
    mend = f"pip install '{name}{supported or ''}'"
    return Check("software", name, status, value, mend, {"version": None, "supported": supported})


def _compiler() -> Check:
    path = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    line = _first_line([path, "--version"]) if path else None
    if path is None or line is None:
        return Check(
            "software",
            "C++ compiler",
            Status.MISSING,
            "none found (looked for $CXX, g++, c++, clang++)",
            "install g++: Inductor compiles CPU partitions with it, and pip builds ktfx's CPU kernels with it; "
            "without one, use --backend eager",
            {"path": None},
        )
    return Check("software", "C++ compiler", Status.OK, f"{line}  ({path})", data={"path": path, "version": line})


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


# ---- the host


def _host() -> list[Check]:
    import torch

    model, flags = _cpu()
    sets = [name for name in (*_X86_SETS, *_ARM_SETS) if name in flags]
    cores, threads = _cores(), torch.get_num_threads()
    total, free = _memory()
    return [
        Check("host", "CPU", Status.OK, model, data={"model": model, "machine": platform.machine()}),
        Check("host", "instruction sets", Status.OK, " ".join(sets) or "none that matters", data={"sets": sets}),
        _kernels(),
        Check(
            "host",
            "cores",
            Status.OK,
            f"{cores} usable, torch uses {threads}",
            data={"cores": cores, "threads": threads},
        ),
        Check(
            "host",
            "memory",
            Status.OK,
            f"{human_bytes(total)}, {human_bytes(free)} available",
            data={"total_bytes": total, "available_bytes": free},
        ),
    ]


def _cpu() -> tuple[str, set[str]]:
    """(model name, flags) of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.machine(), set(flags[1].split()) if flags else set()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[int, int]:
    """(all, available) bytes of the host's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return total, total
    available = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return total, int(available[1]) * 1024 if available else total


def _kernels() -> Check:
    from ktfx.ops import load_ops
    from ktfx.ops.experts_cpu import cpu_kernels_status

    load_ops()
    status = cpu_kernels_status()
    native = status.path == "native"
    return Check(
        "host",
        "experts.cpu",
        Status.OK if native else Status.WARN,
        f"{status.path}: {status.detail}",
        None
        if native
        else "install g++ 11 or newer and reinstall ktfx; until then experts run on ATen, several times slower",
        {"path": status.path, "detail": status.detail},
    )


# ---- GPUs and links


def _gpus(measure: bool) -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        value = "none" if built else "none; this torch was built without CUDA"
        mend = "rule files that name GPUs run with --simulate cpu" + (
            "" if built else "; for GPUs install a torch with CUDA"
        )
        return [Check("GPUs", "GPUs", Status.WARN, value, mend, {"count": 0, "torch_cuda": built})]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"sm_{properties.major}{properties.minor}"
        value = f"{properties.name}, {human_bytes(total)}, {human_bytes(free)} free, {capability}"
        data = {
            "name": properties.name,
            "total_bytes": total,
            "free_bytes": free,
            "capability": [properties.major, properties.minor],
        }
        found.append(Check("GPUs", f"cuda:{index}", Status.OK, value, data=data))
    return [*found, *_links(torch.cuda.device_count(), measure)]


def _links(count: int, measure: bool) -> list[Check]:
    import torch

    known = _known_links()
    found = []
    for index in range(count):
        if not measure:
            break
        down = _bandwidth(torch.device("cpu"), torch.device("cuda", index))
        up = _bandwidth(torch.device("cuda", index), torch.device("cpu"))
        value = f"{down / 1e9:.1f} GB/s to the GPU, {up / 1e9:.1f} GB/s back (pinned memory)"
        rates = {"to_gpu_bytes_per_second": down, "to_host_bytes_per_second": up}
        found.append(Check("links", f"host – cuda:{index}", Status.OK, value, data=rates))
    for a in range(count):
        for b in range(a + 1, count):
            peer = torch.cuda.can_device_access_peer(a, b)
            kind = known.get((a, b))
            parts = [kind] if kind else []
            parts.append("peer access" if peer else "no peer access: copies go through the host")
            data: dict[str, Any] = {"peer_access": peer, "kind": kind}
            if measure:
                rate = _bandwidth(torch.device("cuda", a), torch.device("cuda", b))
                parts.append(f"{rate / 1e9:.1f} GB/s")
                data["bytes_per_second"] = rate
            status = Status.OK if peer else Status.WARN
            found.append(Check("links", f"cuda:{a} – cuda:{b}", status, ", ".join(parts), data=data))
    return found


def _known_links() -> dict[tuple[int, int], str]:
    """(GPU, GPU) → what ``nvidia-smi topo`` calls their link (NV18, PIX, SYS, …); empty where it cannot be asked.

    Only where nothing hides or reorders GPUs: nvidia-smi counts them all, CUDA those that are visible.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return {}
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_topology(done.stdout)


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """The matrix that ``nvidia-smi topo -m`` prints, above its diagonal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    links: dict[tuple[int, int], str] = {}
    for line in text.splitlines():
        row = re.match(r"GPU(\d+)\s+(.*)", line)
        if row is None:
            continue
        for column, kind in enumerate(row[2].split()):
            if column > int(row[1]) and re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", kind):
                links[int(row[1]), column] = kind
    return links


def _bandwidth(source: Any, target: Any) -> float:
    """Bytes a second of one large copy, the best of three."""
    import torch

    host = "cpu" in (source.type, target.type)
    a = torch.ones(_MEASURED_BYTES, dtype=torch.uint8, device=source, pin_memory=host and source.type == "cpu")
    b = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, device=target, pin_memory=host and target.type == "cpu")
    best = 0.0
    for _ in range(4):  # the first sets peer access and mappings up
        _synchronise()
        start = time.perf_counter()
        b.copy_(a, non_blocking=True)
        _synchronise()
        best = max(best, _MEASURED_BYTES / (time.perf_counter() - start))
    return best


def _synchronise() -> None:
    import torch

    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)


# ---- output


def _print(checks: list[Check]) -> None:
    marks = {Status.OK: ("✓", "green"), Status.WARN: ("!", "yellow"), Status.MISSING: ("✗", "red")}
    console = common.stdout()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = None
    for check in checks:
        if check.section != section:
            table.add_row("", Text(check.section, "bold"), "")
            section = check.section
        value = Text(check.value)
        if check.mend:
            value.append(f"\n{check.mend}", "yellow" if check.status is Status.WARN else "red")
        table.add_row(Text(*marks[check.status]), check.name, value)
    console.print(table)
    missing = sum(check.status is Status.MISSING for check in checks)
    console.print(Text("\nnothing that ktfx needs is missing" if not missing else f"\n{missing} to mend", "bold"))
