"""What a part keeps of the last n tokens, as ports: a state that a causal convolution begins with.

A state's last axis has to be a multiple of 32 (coremltools issue 2631), so it is that wide, with
its n columns first: slices at other offsets of the last axis saturate on the M1 and M2 engines.
"""

from ane_moe.model.port import Port

WIDTH = 32
RECENT = "recent"  # what the names of these states end with


def recent_port(name: str, channels: int) -> Port:
    """The state, `(1, C, 1, 32)`."""
    return Port(name, (1, channels, 1, WIDTH), f"state.{{0}}.{name}")


def shift_port(name: str, count: int, tokens: int) -> Port:
    """What picks the last `count` real tokens out of those kept and those of a call, `(1, 1, n + T,
    32)`."""
    return Port(name, (1, 1, count + tokens, WIDTH), f"shift.{count}")
