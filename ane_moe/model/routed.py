"""A mixer and routing in one call, or routing alone, as data."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ane_moe.model.latent import LatentRanks, entering_rows
from ane_moe.model.mixer import MixerConfig
from ane_moe.model.port import ADDED, FFN_INPUT, GUESS, LATER, STREAM, Port, Ports
from ane_moe.model.ranking import Ranking
from ane_moe.model.residual import PLAIN, ResidualSpec, affine_rows
from ane_moe.model.router import router_ports
from ane_moe.model.spec import (
    AnyRouterSpec,
    LatentSpec,
    NormSpec,
    router_norm_rows,
)
from ane_moe.model.weight import Early, EarlyBias, Row

EARLY = "early"


@dataclass(frozen=True)
class EarlyConfig:
    """So many `experts` of a later layer, scored early, from the stream, by what that layer's
    router ranks them by."""

    experts: int
    ranking: Ranking

    def rows(self, d_model: int) -> Iterator[Row]:
        yield Early(f"{EARLY}.weight", (self.experts, d_model))
        if self.ranking.bias:
            yield EarlyBias(f"{EARLY}.choice_bias", (self.experts,))

    def port(self, tokens: int) -> Port:
        return Port("guess", (1, self.experts, 1, tokens), f"{GUESS}.{{0}}")


@dataclass(frozen=True)
class RoutedMixerConfig:
    """`early`: experts of a later layer that it scores too, in calls of decode."""

    mixer: MixerConfig
    router: AnyRouterSpec
    residual: ResidualSpec = PLAIN  # of the feed-forward block
    router_norm: bool = False
    early: EarlyConfig | None = None

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        d = self.mixer.d_model
        yield from (row.under("attn") for row in self.mixer.rows())
        norm = self.mixer.norm
        yield from (row.under("ffn") for row in self.residual.read_rows(norm, d))
        yield from (row.under("ffn") for row in router_norm_rows(norm, d, self.router_norm))
        yield from (row.under("ffn.router") for row in self.router.rows(d))
        if self.residual.affine:
            yield from (row.under("ffn") for row in affine_rows(d))
        if self.early is not None:
            yield from (row.under("ffn") for row in self.early.rows(d))

    def of(self, name: str) -> "RoutedMixerConfig":
        """What the function of this name computes."""
        return replace(self, early=_guessed_by(name, self.early))

    def ports(self, tokens: int) -> Ports:
        ports, routing = self.mixer.ports(tokens), router_ports(self.router, tokens)
        stream = (1, self.mixer.d_model, 1, tokens)
        normed = [Port("ffn_input", stream, FFN_INPUT)]
        if self.residual.norms != "before":  # experts add to nothing, and are normed then
            normed.append(Port("added", stream, ADDED))
        if self.residual.hands_on:  # what no expert computes is there already
            normed.append(Port("later", stream, LATER))
        return replace(
            ports,
            inputs=(*ports.inputs, *routing.inputs),
            outputs=(*ports.outputs, *normed, *routing.outputs, *_guess(self.early, tokens)),
        )


@dataclass(frozen=True)
class RoutingConfig:
    """Of a layer without a mixer, whose experts add to the stream, or work on a `latent` and add
    there; `early` as above."""

    d_model: int
    norm: NormSpec
    router: AnyRouterSpec
    early: EarlyConfig | None = None
    latent: LatentSpec | None = None
    latent_ranks: LatentRanks = (0, 0)

    def rows(self) -> Iterator[Row]:
        """The block's parameters, in its own order."""
        yield from (row.under("ffn") for row in self.norm.rows(self.d_model))
        yield from (row.under("ffn.router") for row in self.router.rows(self.d_model))
        if self.latent is not None:
            rows = entering_rows(self.latent, self.d_model, self.latent_ranks)
            yield from (row.under("ffn") for row in rows)
        if self.early is not None:
            yield from (row.under("ffn") for row in self.early.rows(self.d_model))

    def of(self, name: str) -> "RoutingConfig":
        """What the function of this name computes."""
        return replace(self, early=_guessed_by(name, self.early))

    def ports(self, tokens: int) -> Ports:
        shape, routing = (1, self.d_model, 1, tokens), router_ports(self.router, tokens)
        given = Port("ffn_input", shape, FFN_INPUT)
        begun: tuple[Port, ...] = ()
        if self.latent is not None:
            given = replace(given, shape=(1, self.latent.width, 1, tokens))
            begun = (replace(given, name="added", slot=ADDED),)
        return Ports(
            (Port("x", shape, STREAM), *routing.inputs),
            (given, *begun, *routing.outputs, *_guess(self.early, tokens)),
        )


def _guessed_by(name: str, early: EarlyConfig | None) -> EarlyConfig | None:
    """Nothing while a prompt is read: its tokens together call nearly every expert."""
    return early if name == "decode" else None


def _guess(early: EarlyConfig | None, tokens: int) -> tuple[Port, ...]:
    return () if early is None else (early.port(tokens),)
