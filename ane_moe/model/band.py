"""Attention among the tokens of one call, as data."""

from dataclasses import dataclass

from ane_moe.model.attention import AttentionConfig
from ane_moe.model.kv_cache import rope_ports
from ane_moe.model.port import BAND, MASK, Port
from ane_moe.model.spec import BandSpec


@dataclass(frozen=True)
class BandConfig(AttentionConfig):
    mixer: BandSpec

    @property
    def states(self) -> tuple[Port, ...]:
        return ()

    def host(self, tokens: int) -> tuple[Port, ...]:
        mask = Port(MASK, (1, 1, tokens, tokens), f"{MASK}.{BAND}{self.mixer.reach}")
        return (*rope_ports(self.mixer.rope, self.rotary, tokens), mask)
