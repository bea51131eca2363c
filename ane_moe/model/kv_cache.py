"""The ports of a KV cache, as grouped-query mixers share it."""

from ane_moe.model.port import Port, Shape


def cache_states(kv_heads: int, key: int, slots: int, value: int | None = None) -> tuple[Port, ...]:
    """The caches of a layer's keys and values, `(1, K, D, S)`, values maybe of another width."""
    return tuple(
        Port(name, (1, kv_heads, width, slots), f"state.{{0}}.{name}")
        for name, width in (("k_cache", key), ("v_cache", value or key))
    )


def rope_ports(rope: str | None, rotary: int, tokens: int) -> tuple[Port, ...]:
    """The rows of a rotary table for the tokens of a call, where there is one."""
    if not rotary:
        return ()
    shape: Shape = (1, 1, rotary, tokens)
    return tuple(Port(name, shape, f"rope.{rope}.{name}") for name in ("cos", "sin"))


def cache_ports(
    rope: str | None,
    rotary: int,
    seen: int | str | None,
    slots: int,
    tokens: int,
    ring: bool = False,
) -> tuple[Port, ...]:
    """What attention over a cache asks of the host: rotary rows, what may be seen, where to write.
    In a `ring` tokens go on at the first slot after the last."""
    row, of = (1, 1, tokens, slots), f".ring_{slots}" if ring else ""
    return (
        *rope_ports(rope, rotary, tokens),
        Port("mask", row, f"mask.{seen or 'all'}{of}"),
        Port("write", row, f"write{of}"),
        Port("keep", (1, 1, 1, slots), f"keep{of}"),
    )
