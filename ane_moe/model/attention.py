"""Grouped-query attention as data."""

from dataclasses import dataclass

from ane_moe.model.kv_cache import cache_ports, cache_states
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import Port
from ane_moe.model.spec import GqaSpec


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    mixer: GqaSpec

    @property
    def states(self) -> tuple[Port, ...]:
        m = self.mixer
        return cache_states(m.kv_heads, m.head_dim, self.slots, m.value)

    def host(self, tokens: int) -> tuple[Port, ...]:
        m = self.mixer
        return cache_ports(m.rope, self.rotary, m.window, self.slots, tokens, m.sees_prompt)
