"""torch.library ops, one file a family. ``load_ops`` registers them all, and what installed packages add."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points


def load_ops() -> None:
    """Import every op family and kernel, once; other packages' come by the entry-point group ``ktfx.kernels``."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="ktfx.kernels"):
        entry.load()
