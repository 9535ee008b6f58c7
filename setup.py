"""Builds the CPU kernels (ktfx/cpu_kernels) into one shared library; all else about the package is in pyproject.toml.

The library is loaded by ctypes and needs neither Python's nor torch's headers, only a C++17 compiler. Without one the
package installs all the same, says so, and runs its experts on ATen. Every instruction set is a translation unit with
its own flags; which of them runs is decided when the library is loaded, never when it is built.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("ktfx") / "cpu_kernels"
COMMON = ["experts", "linear", "pack", "async", "pool", "features", "measure", "isa_portable", "isa_amx_emulated"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
X86 = {"isa_avx2": AVX2, "isa_avx512": AVX512, "isa_amx": AMX}
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-function",
    "-Wno-maybe-uninitialized",  # false alarms in GCC 12's own AVX-512 headers
]


class BuildKernels(build_ext):
    """Compiles the translation units side by side and links them; a failure is a message, never a failed install."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self._compile(target, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"ktfx: the CPU kernels were not built: {error}\n"
                "ktfx: experts on the CPU will run on ATen, several times slower; install GCC 11+ and reinstall.",
                file=sys.stderr,
            )

    def _compile(self, target: Path, temp: Path) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if not compiler:
            raise OSError("there is no C++ compiler (looked for $CXX, g++, c++)")
        extra = os.environ.get("KTFX_CXXFLAGS", "").split()
        units: dict[str, list[str]] = {name: [] for name in COMMON}
        units |= X86 if platform.machine() in ("x86_64", "AMD64") else {}
        temp.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = {name: temp / f"{name}.o" for name in units}

        def compile_unit(name: str) -> None:
            command = [compiler, *FLAGS, *units[name], *extra, "-c", str(FOLDER / f"{name}.cpp"), "-o", objects[name]]
            subprocess.run(command, check=True)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(compile_unit, units))
        # Written beside the target and moved there: a process that has the old library loaded keeps it.
        fresh = target.with_suffix(".tmp")
        subprocess.run([compiler, "-shared", *extra, "-o", fresh, *objects.values(), "-pthread"], check=True)
        fresh.replace(target)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built, source = Path(self.build_lib, self.get_ext_filename(ext.name)), Path(self.get_ext_filename(ext.name))
            if built.exists():
                shutil.copy2(built, source.with_suffix(".tmp"))
                source.with_suffix(".tmp").replace(source)


# Listed as an extension so that every way of installing (wheel, editable, build_ext --inplace) builds it.
setup(
    ext_modules=[Extension("ktfx.cpu_kernels.libktfx_cpu", sources=[str(FOLDER / f"{name}.cpp") for name in COMMON])],
    cmdclass={"build_ext": BuildKernels},
)
