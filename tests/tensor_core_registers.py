"""Reads Hopper's machine code: are registers that tensor cores still read written again?

A product with its left operand in registers (``HGMMA … R24, R40, gdesc[…]``) goes on while the program does; only a
``WARPGROUP.DEPBAR.LE gsb0, N`` that leaves at most N later groups of products unfinished ends it. A group ends with the
product that carries ``gsb0``. Nothing in the hardware guards the operand's registers until then, and no test of values
is sure to catch a write to them: it depends on which warp comes first.
"""

from __future__ import annotations

import re

PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+), gdesc")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
BRANCH = re.compile(r"\bBRA (\.?\w+)")
# What has a register first that it reads, or no register at all.
READS_ONLY = ("ST", "LDGSTS", "RED", "ATOMS", "HGMMA", "BAR", "BRA", "ISETP", "FSETP", "PLOP3", "R2UR", "WARPGROUP")


def lines(sass: str) -> list[str]:
    """Instructions without control codes and predicates, and labels with their colon."""
    found = []
    for line in sass.splitlines():
        text = line.split("\t")[-1].strip().rstrip(";")
        found.append(re.sub(r"^@!?U?P\w+ ", "", text))
    return found


def written(instruction: str) -> set[int]:
    """Numbers of the registers that an instruction writes."""
    name, _, operands = instruction.partition(" ")
    target = re.match(r"R(\d+)\b", operands)
    if target is None or name.startswith(READS_ONLY):
        return set()
    wide = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name or name.startswith("CS2R") else 1
    return set(range(int(target[1]), int(target[1]) + wide))


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop: from a label to a branch back to it."""
    code, labels, found = lines(sass), {}, []
    for i, text in enumerate(code):
        if text.endswith(":"):
            labels[text[:-1]] = i
        jump = BRANCH.search(text)
        if jump and jump[1] in labels:
            found.append([t for t in code[labels[jump[1]] : i + 1] if not t.endswith(":")])
    return found


def overwritten(sass: str) -> list[str]:
    """Each product of a loop whose left operand's registers are written before it has surely ended."""
    found = []
    for loop in loops(sass):
        for at, text in enumerate(loop):
            operand = PRODUCT.match(text)
            if operand is None:
                continue
            registers = set(range(int(operand[1]), int(operand[1]) + 4))
            ended, later = "gsb0" in text, 0
            for following in loop[at + 1 :] + loop[: at + 1]:
                if following.startswith("HGMMA") and "gsb0" in following:
                    later, ended = later + ended, True
                wait = WAIT.match(following)
                if wait and ended and int(wait[1], 16) <= later:
                    break
                if written(following) & registers:
                    found.append(f"{text}: overwritten by {following}")
                    break
    return found


def products_a_wait(sass: str) -> list[float]:
    """Products between two waits, for each loop that has products with an operand in registers."""
    counts = [
        (sum(bool(PRODUCT.match(t)) for t in loop), sum(bool(WAIT.match(t)) for t in loop)) for loop in loops(sass)
    ]
    return [products / max(waits, 1) for products, waits in counts if products]
