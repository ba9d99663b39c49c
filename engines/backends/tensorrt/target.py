"""What a plan is built for, in words that the manifest keeps, and whether a device can run it."""

from __future__ import annotations

PORTABLE = "portable"  # RTX: any device from Ampere on
AMPERE_PLUS = "8.0+"  # full TensorRT's hardware compatibility level of that name
AMPERE = (8, 0)


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether a plan for ``target`` runs on a device of this compute capability.

    A target is "portable", "8.0+", "8.9", or several capabilities: "8.6, 8.9".
    """
    if target in (PORTABLE, AMPERE_PLUS):
        return capability >= AMPERE
    return "{}.{}".format(*capability) in target.split(", ")


def dotted(member: str) -> str:
    """From the API's "SM89" to "8.9", from "SM120" to "12.0"."""
    digits = member.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"
