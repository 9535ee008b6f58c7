"""Device names and the real devices behind them.

Names, not ``torch.device``s, decide partitions and transfers: two names may be simulated by one real device, and still
every value that crosses from one to the other is copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ktfx.errors import KtfxError, OptionError, Origin, PlacementError, RuleError
from ktfx.text import did_you_mean

if TYPE_CHECKING:
    from ktfx.ruleset import Ruleset

_REAL_NAME = re.compile(r"(cpu|cuda)(?::(\d{1,3}))?")
_OTHER_KINDS = ("npu", "xpu", "mps", "hpu", "xla", "musa", "mlu", "rocm", "hip", "meta")


@dataclass(frozen=True)
class DeviceMap:
    """Device name → real device, for every name that a rule file uses, and ``cpu``."""

    real: Mapping[str, torch.device]

    def __getitem__(self, name: str) -> torch.device:
        try:
            return self.real[canonical(name)]
        except KeyError:
            raise KtfxError(
                f"no device named {name!r}",
                expected="one of " + ", ".join(self.real),
                mend=did_you_mean(name, self.real) or "add it to `devices:` in the rule file",
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.real)

    def __contains__(self, name: str) -> bool:
        return canonical(name) in self.real


def canonical(name: str) -> str:
    """One spelling for one device: ``cuda`` is ``cuda:0``, ``cpu:0`` is ``cpu``."""
    return {"cuda": "cuda:0", "cpu:0": "cpu"}.get(name, name)


def checked_name(text: str, declared: Iterable[str], origin: Origin, rule: str | None = None) -> str:
    """The device name a rule means: one of ``declared``, else cpu or cuda:N. RuleError for anything else."""
    declared = list(declared)
    if text in declared:
        return text
    if _REAL_NAME.fullmatch(text):
        return canonical(text)
    if text.split(":")[0] in _OTHER_KINDS:
        raise RuleError(
            f"the device {text!r} is of a kind that ktfx does not run on",
            origin=origin,
            rule=rule,
            expected="cpu, cuda:N, or a name from `devices:`",
            mend=f"write cuda:N instead of {text!r}, or use a rule file made for NVIDIA GPUs",
        )
    known = [*declared, "cpu", "cuda:0", "cuda:1"]
    raise RuleError(
        f"unknown device {text!r}",
        origin=origin,
        rule=rule,
        expected="a name from `devices:`" + (f" ({', '.join(declared)})" if declared else "") + ", cpu or cuda:N",
        mend=did_you_mean(text, known) or f"add {text!r} to `devices:`",
    )


def written_device(name: str, devices: Mapping[str, str]) -> str:
    """What a name stands for in the rule file, before any simulation: ``gpu0`` → ``cuda:0``."""
    return canonical(devices.get(name, name))


def is_host(name: str, devices: Mapping[str, str]) -> bool:
    return written_device(name, devices).split(":")[0] == "cpu"


def existing_devices() -> list[str]:
    """The real devices of this machine."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def device_map(ruleset: Ruleset, simulate: str | Mapping[str, str] | None = None) -> DeviceMap:
    """The real device of every name the rules use.

    simulate: one device for all names that do not stand for the host (``"cpu"``), or a mapping from names to devices;
    the text form ``"gpu0=cpu,gpu1=cpu"`` is a mapping too.

    Raises PlacementError for a device that this machine lacks, OptionError for a ``simulate`` that names nothing.
    """
    # A host name may be chosen for an op that runs on the host only, though no rule writes it.
    hosts = {name: ruleset.origin for name in ruleset.devices if is_host(name, ruleset.devices)}
    names = {**hosts, **ruleset.device_origins}
    chosen = _simulated(ruleset, simulate)
    real: dict[str, torch.device] = {"cpu": torch.device("cpu")}
    for name, origin in names.items():
        target = chosen.get(name, written_device(name, ruleset.devices))
        real[name] = _existing(name, target, origin, simulated=name in chosen)
    return DeviceMap(real)


def _simulated(ruleset: Ruleset, simulate: str | Mapping[str, str] | None) -> dict[str, str]:
    if simulate is None:
        return {}
    names = ruleset.device_origins
    if isinstance(simulate, str) and "=" in simulate:
        simulate = dict(part.split("=", 1) for part in simulate.replace(" ", "").split(",") if "=" in part)
    if isinstance(simulate, str):
        target = _option_device(simulate)
        return {name: target for name in names if not is_host(name, ruleset.devices)}
    found: dict[str, str] = {}
    for name, target in simulate.items():
        if canonical(name) not in names and name not in names:
            raise OptionError(
                f"simulate names the device {name!r}, which the rules do not use",
                expected="one of " + ", ".join(names),
                mend=did_you_mean(name, names),
            )
        found[name if name in names else canonical(name)] = _option_device(target)
    return found


def _option_device(text: str) -> str:
    if not isinstance(text, str) or not _REAL_NAME.fullmatch(text):
        raise OptionError(
            f"simulate cannot map to {text!r}", expected="cpu or cuda:N", mend="use --simulate cpu to try any rule file"
        )
    return canonical(text)


def _existing(name: str, target: str, origin: Origin, simulated: bool) -> torch.device:
    kind, _, index = target.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available() or int(index) >= torch.cuda.device_count():
        called = f"{name!r}" if name == target else f"{name!r} ({target})"
        raise PlacementError(
            f"the device {called} does not exist on this machine" + (" (from simulate)" if simulated else ""),
            origin=origin,
            expected="one of " + ", ".join(existing_devices()),
            mend="pass --simulate cpu (option simulate) to try the rules without it, or edit `devices:`",
        )
    return torch.device(target)
