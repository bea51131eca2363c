"""A mixture-of-experts layer, or a self-contained part of one."""

from torch import Tensor, nn

from ane_moe.model.moe import MoeConfig
from ane_moe.parts.beside import Beside
from ane_moe.parts.experts import WithShared, tree_sum
from ane_moe.parts.latent import make_entering, make_leaving
from ane_moe.parts.mlp import GatedMlp
from ane_moe.parts.norm import make_norm
from ane_moe.parts.projection import Projection
from ane_moe.parts.residual import kept, make_residual, norm_before, residual_alone
from ane_moe.parts.router import idle_share, make_router


class Moe(WithShared):
    """`y = x + sum_e gate_e * expert_e(norm(x))` with every expert computed and the unchosen
    weighted by zero."""

    config: MoeConfig

    def __init__(self, config: MoeConfig):
        super().__init__()
        self.config = config
        d, moe = config.d_model, config.moe
        self.norm = norm_before(d, config.norm, config.residual)
        if moe.router_norm:
            self.router_norm = make_norm(d, config.norm)
        self.router = make_router(d, moe.router, config.soft)
        if moe.latent is not None:
            self.latent_in = make_entering(d, moe.latent, config.latent_ranks)
        width = moe.width(d)
        self.experts = nn.ModuleList(
            GatedMlp(width, moe.expert, config.ranks) for _ in range(config.experts)
        )
        if config.split:
            # One-hot rows, which pick this part's gates.
            self.select = Projection(moe.router.classes, config.experts)
        if config.shared is not None:
            self.hold(d, config.shared, config.shared_ranks)
        if moe.latent is not None and not config.joined:
            self.latent_out = make_leaving(d, moe.latent, config.latent_ranks)
        if moe.beside is not None and not config.joined:
            self.beside = Beside(d, config.norm, moe.beside, config.beside_ranks)
        if not config.first:
            self.residual = residual_alone(d, config.residual.affine)
        elif not config.joined:
            self.residual = make_residual(d, config.norm, config.residual)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = inputs["x"]
        h = self.norm(x)
        read = self.router_norm(x) if self.config.moe.router_norm else h
        gates, handed_on = self.router.gates(read, inputs)  # (1, E, 1, T)
        mine = self.select(gates) if self.config.split else gates
        latent = self.config.moe.latent is not None
        given = self.latent_in(h) if latent else h  # (1, C, 1, T), C = r or d
        parts = [expert(given, mine[:, e : e + 1]) for e, expert in enumerate(self.experts)]
        outputs = {"gates": gates, **handed_on}
        if not self.config.first:
            return {"y": self.residual.alone(tree_sum(parts)), **outputs}
        if latent and not self.config.joined:
            parts = [self.latent_out(tree_sum(parts))]
        shared = [self.of_shared(h)] if self.config.shared else []
        added = tree_sum([*shared, *idle_share(h, gates, self.config.moe.router), *parts])
        if self.config.joined or self.config.residual.hands_on:
            return {"y": added, **outputs}
        if self.config.moe.beside is not None:
            added = self.beside(x, added)
        if self.config.residual.parallel:
            added = added + inputs["added"]
        # The stream comes last: it is larger than what is added to it, and fp16 rounds at the
        # larger term's scale.
        return {"y": self.residual(kept(x, h, self.config.residual.keeps), added), **outputs}
