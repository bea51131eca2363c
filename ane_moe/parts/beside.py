"""A dense MLP next to the experts of a layer."""

from torch import Tensor, nn

from ane_moe.model.mlp import MlpRanks
from ane_moe.model.spec import MlpSpec, NormSpec
from ane_moe.parts.mlp import GatedMlp
from ane_moe.parts.norm import make_norm


class Beside(nn.Module):
    """`norm(mlp(norm(x))) + norm(experts)` for a stream x and what experts give, all `(1, d, 1,
    T)`."""

    def __init__(self, d_model: int, norm: NormSpec, mlp: MlpSpec, ranks: MlpRanks):
        super().__init__()
        self.norm = make_norm(d_model, norm)
        self.mlp = GatedMlp(d_model, mlp, ranks)
        self.after = make_norm(d_model, norm)
        self.experts_after = make_norm(d_model, norm)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        result: Tensor = self.after(self.mlp(self.norm(x))) + self.experts_after(experts)
        return result
