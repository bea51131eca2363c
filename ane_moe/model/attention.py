"""Grouped-query attention as data."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ane_moe.model.kv_cache import cache_ports, cache_states
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import CHUNK, PART, PASSED, PROMPT, STATE, Port
from ane_moe.model.spec import GqaSpec, SharedGqaSpec, Temperature


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    mixer: GqaSpec
    ring: ClassVar[bool] = False

    @property
    def states(self) -> tuple[Port, ...]:
        m = self.mixer
        return cache_states(m.kv_heads, m.head_dim, self.slots, m.value)

    def host(self, tokens: int) -> tuple[Port, ...]:
        m, seen = self.mixer, seen_of(self.mixer)
        ports = cache_ports(m.rope, self.rotary, seen, self.slots, tokens, self.ring)
        return ports if m.temperature is None else (*ports, passed_port(m.temperature, tokens))


@dataclass(frozen=True)
class SharedAttentionConfig(AttentionConfig):
    """Attention over the caches of another layer, which come in as they stand: it keeps nothing."""

    mixer: SharedGqaSpec

    @property
    def states(self) -> tuple[Port, ...]:
        return ()

    def host(self, tokens: int) -> tuple[Port, ...]:
        asked = (port for port in super().host(tokens) if port.name not in ("write", "keep"))
        return (*asked, *self.read)

    @property
    def read(self) -> tuple[Port, ...]:
        """The caches of the layer that has them."""
        source = self.mixer.source
        return tuple(replace(port, slot=f"{STATE}.{source}.{port.name}") for port in super().states)


@dataclass(frozen=True)
class RingConfig(AttentionConfig):
    """Attention in a window, over a cache of little more than that: what tokens of later calls do
    not see is written over."""

    ring: ClassVar[bool] = True


def seen_of(mixer: GqaSpec) -> int | str | None:
    """What a token sees, as the argument of a mask."""
    if mixer.chunk is not None:
        return f"{CHUNK}{mixer.chunk}"
    return f"{PROMPT}{mixer.window}" if mixer.sees_prompt and mixer.window else mixer.window


def passed_port(temperature: Temperature, tokens: int) -> Port:
    """What a temperature grows by, for each token."""
    part = PART if temperature.power else ""
    return Port(PASSED, (1, 1, 1, tokens), f"{PASSED}.{part}{temperature.steps}")
