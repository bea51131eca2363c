"""How large partial sums get, in any order of their terms, while a model of Hugging Face's runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ane_moe.families.taps import Taps

# A product with a matrix, and whether the matrix is stored with what leaves it first.
PRODUCTS: dict[Callable[..., Any], bool] = {
    torch.nn.functional.linear: True,
    torch.matmul: False,
    Tensor.matmul: False,
    Tensor.__matmul__: False,
}
GATE_UP = "gate_up"  # in one matrix: gate first


@dataclass(frozen=True)
class KnownMatrices:
    """Matrices of a layer as stored, by what they give (`values`, `up`, `gate_up`, `down`): `alone`
    by identity, those of the module of the `experts` by shape."""

    alone: Mapping[int, str] = field(default_factory=dict)
    experts: nn.Module | None = None
    of_experts: Mapping[tuple[int, ...], str] = field(default_factory=dict)


def known_matrices(layer: nn.Module, taps: Taps, experts: nn.Module | None) -> KnownMatrices:
    """By the names that the family's taps say. Experts' stacks are known where they are stored with
    what leaves them first: the others' have another activation, that is not linear in `up`, and
    so have those of families that name no `up`. Where gate and up have one shape, both count as
    `up`."""
    names = {taps.values: "values", taps.up: "up", taps.gate_up: GATE_UP, taps.down: "down"}
    alone = {
        id(module.weight): names[path.rpartition(".")[2]]
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names
    }
    stacks = dict(experts.named_parameters(recurse=False)) if experts else {}
    shapes: dict[tuple[int, ...], str] = {
        tuple(stacks[f"{name}_proj"].shape[1:]): name
        for name in (GATE_UP, "up", "down")
        if taps.up and f"{name}_proj" in stacks and f"{GATE_UP}_proj_bias" not in stacks
    }
    for path, stack in experts.named_parameters() if experts else ():
        if stack.dim() == 3 and path in names and "." in path:  # of modules of their own
            shapes[tuple(stack.shape[1:])] = names[path]
        if path.endswith(f".{taps.up}") and stack.dim() == 2:  # of all experts, without an axis
            width = len(stack) // int(getattr(experts, "num_experts", 1))
            shapes |= {(stack.shape[1], width): "up", (width, stack.shape[1]): "down"}
    return KnownMatrices(alone, experts, shapes)


class PartialSums(TorchFunctionMode):
    """Hears every product with a matrix that gives hidden states, `width` channels, or a `down`:
    `largest` is the largest magnitude of a partial sum that its terms reach in the worst order. So
    are `values` and `ups`, of what is known to give them, and `hidden` is the largest number that
    enters a `down`.

    Of terms whose magnitudes add up to A, and which add up to s, those of one sign are
    (A + |s|) / 2.
    """

    def __init__(self, width: int, known: KnownMatrices | None = None):
        super().__init__()
        self.width, self.known = width, known or KnownMatrices()
        self.largest = self.values = self.ups = self.hidden = 0.0
        self._in_experts = False

    def __enter__(self) -> "PartialSums":
        experts = self.known.experts
        self._handles = []
        if experts is not None:
            self._handles = [
                experts.register_forward_pre_hook(lambda *_: self._enter_experts(True)),
                experts.register_forward_hook(lambda *_: self._enter_experts(False)),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in PRODUCTS and args[1].dim() == 2:
            x, stored, *bias = args
            matrix, begin = stored.T if PRODUCTS[function] else stored, _magnitude(*bias)
            self._hear(self._name(stored), x, matrix, result.abs() + begin)
        elif function is torch.bmm and self._in_experts:
            for x, matrix, own in zip(*args, result, strict=True):
                self._hear(self._name(matrix), x, matrix, own.abs())
        return result

    def _enter_experts(self, inside: bool) -> None:
        self._in_experts = inside

    def _name(self, stored: Tensor) -> str:
        shapes = self.known.of_experts if self._in_experts else {}
        return self.known.alone.get(id(stored)) or shapes.get(tuple(stored.shape), "")

    def _hear(self, name: str, x: Tensor, matrix: Tensor, result: Tensor) -> None:
        """`matrix` with what enters it first; of the result and its bias the magnitudes."""
        if not result.numel():
            return
        if name == "values":
            self.values = max(self.values, _reached(x, matrix, result))
        elif name == "up":
            self.ups = max(self.ups, _reached(x, matrix, result))
        elif name == GATE_UP:
            half = matrix.shape[1] // 2
            self.ups = max(self.ups, _reached(x, matrix[:, half:], result[..., half:]))
        elif result.shape[-1] == self.width or name == "down":  # a latent's, where experts have one
            self.largest = max(self.largest, _reached(x, matrix, result))
        if name == "down":
            self.hidden = max(self.hidden, float(x.abs().max()))


def _magnitude(bias: Tensor | None = None) -> Tensor | float:
    return 0.0 if bias is None else bias.abs()


def _reached(x: Tensor, matrix: Tensor, result: Tensor) -> float:
    return float((x.abs() @ matrix.abs() + result).max()) / 2
