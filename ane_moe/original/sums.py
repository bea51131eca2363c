"""How large partial sums get, in any order of their terms, while a model of Hugging Face's runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# A product with a matrix, and whether the matrix is stored with what leaves it first.
PRODUCTS: dict[Callable[..., Any], bool] = {
    torch.nn.functional.linear: True,
    torch.matmul: False,
    Tensor.matmul: False,
    Tensor.__matmul__: False,
}


class PartialSums(TorchFunctionMode):
    """Hears every product with a matrix that gives hidden states, `width` channels: `largest` is
    the largest magnitude of a partial sum that its terms reach in the worst order.

    Of terms whose magnitudes add up to A, and which add up to s, those of one sign are
    (A + |s|) / 2.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width, self.largest = width, 0.0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in PRODUCTS and args[1].dim() == 2 and result.shape[-1:] == (self.width,):
            self._hear(args[0], args[1].T if PRODUCTS[function] else args[1], result)
        return result

    def _hear(self, x: Tensor, matrix: Tensor, result: Tensor) -> None:
        magnitudes = x.abs() @ matrix.abs()
        if magnitudes.numel():
            self.largest = max(self.largest, float((magnitudes + result.abs()).max()) / 2)
