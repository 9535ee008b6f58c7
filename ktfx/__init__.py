"""ktfx: a torch.compile backend that runs Mixture-of-Experts models over GPUs and host by rules in a YAML file."""

from ktfx.api import compile, refresh, restore, state_of
from ktfx.errors import KtfxError, KtfxWarning
from ktfx.resolve import resolve
from ktfx.ruleset import load_ruleset

__all__ = ["KtfxError", "KtfxWarning", "compile", "load_ruleset", "refresh", "resolve", "restore", "state_of"]
