"""What a user's failing script looks like: ``python planted_script.py FAULT LAYERS LAYER``; exit code 1 if wrong."""

from __future__ import annotations

import sys

import torch
from planted import inputs, planted_model, planted_rules

import ktfx
from ktfx.verify import relative_error


def main() -> int:
    fault, layers, layer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with torch.no_grad():
        want = planted_model(layers)(*inputs())
        model = ktfx.compile(
            planted_model(layers), planted_rules(fault, layer), simulate="cpu", partition_backend="eager"
        )
        return int(relative_error(model(*inputs()), want) > 5e-3)


if __name__ == "__main__":
    sys.exit(main())
