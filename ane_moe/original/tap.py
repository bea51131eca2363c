"""Listening to a decoder layer of Hugging Face's model, at the places that its family names.

T = tokens, d = d_model, E = experts (and the class that skips them), k = experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ane_moe.families.taps import Taps
from ane_moe.model.port import LATER, slot_arguments
from ane_moe.original.golden import LayerGolden
from ane_moe.original.sums import PartialSums, known_matrices

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "": lambda scores: scores,
}


def pieces(layer: nn.Module, taps: Taps) -> list[nn.Module]:
    """What is a layer of ours: the layer, or each piece of it."""
    if not taps.pieces:
        return [layer]
    return [
        nn.ModuleDict({ours: layer.get_submodule(path) for ours, path in piece.items()})
        for piece in taps.pieces
    ]


@dataclass(frozen=True)
class TappedLayer:
    """A decoder layer, and its parts by what they are for."""

    layer: nn.Module
    taps: Taps

    @property
    def ffn_norm(self) -> nn.Module:
        """The norm in front of the feed-forward block."""
        return self.layer.get_submodule(self.taps.ffn_norm)

    @property
    def is_mixer(self) -> bool:
        """Whether it has no feed-forward block."""
        return any(self._of_class(ending) is not None for ending in self.taps.alone)

    @property
    def router(self) -> nn.Module | None:
        return self._of_class(self.taps.router)

    @property
    def experts(self) -> nn.Module | None:
        return self._named(self.taps.sorted_block) or self._of_class("Experts")

    @property
    def block(self) -> nn.Module | None:
        """The feed-forward block that holds the experts: themselves, where the layer does."""
        experts = self.experts
        if self.taps.sorted_block:
            return experts
        owners = (one for one in self.layer.modules() if getattr(one, "experts", None) is experts)
        owner = next(owners, None)
        return experts if owner is self.layer else owner

    @property
    def choice_bias(self) -> torch.Tensor | None:
        """What is added to scores for the choice alone, `[E]`."""
        path = self.taps.choice_bias
        module, _, name = path.rpartition(".")
        holders = (self.router, self.block)
        found = (holder.get_submodule(module) for holder in holders if holder is not None and path)
        return next((getattr(owner, name) for owner in found if hasattr(owner, name)), None)

    @property
    def added_scale(self) -> torch.Tensor | float:
        """What multiplies the output of the feed-forward block on its way into the stream: by
        channel `[d]`, or one number."""
        if self.taps.residuals:
            return self.layer.get_parameter(f"{self.taps.residuals[1]}.{self.taps.added_scale}")
        return self.residual_multiplier

    @property
    def residual_multiplier(self) -> float:
        """The number that multiplies what both blocks add."""
        own = self.taps.added_factor or "residual_multiplier"
        return float(getattr(self.layer, own, 1.0))

    def shared(self, ffn_input: torch.Tensor) -> torch.Tensor | float:
        """What an expert beside the block gives, where there is one."""
        module = self._named(self.taps.shared)
        return 0.0 if module is None else module(ffn_input)

    def routed(self, output: Any) -> tuple[torch.Tensor, Any, torch.Tensor]:
        """What the router gave: logits (or scores), weights and choices."""
        at = self.taps.logits
        if at is None:
            return output[0], output[1], output[2]
        logits = output if isinstance(output, torch.Tensor) else output[at]
        holder: Any = self.router if hasattr(self.router, "top_k") else self.block
        return logits, None, logits.topk(holder.top_k).indices

    def ranked(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Scores `[N,E]` as they compete for the k chosen `[N,k]`: outside of the groups chosen
        from, an expert is at least as far behind as its group is."""
        if self.taps.groups is None:
            return scores
        groups, opened = (int(getattr(self.router, name) or 1) for name in self.taps.groups)
        if opened == groups:
            return scores
        by_group = scores.unflatten(1, (groups, -1))
        best = by_group.topk(self.taps.group_best, dim=-1).values.sum(-1)  # [N,G]
        behind = (best.topk(opened, dim=1).values[:, -1:] - best).clamp(min=0)
        last = scores.gather(1, chosen).amin(1, keepdim=True)
        each = behind.repeat_interleave(scores.shape[1] // groups, dim=1)
        return torch.where(each > 0, torch.minimum(scores, last - each), scores)

    @property
    def latent(self) -> nn.Module | None:
        """What experts are given the normed stream by, where they work on a latent."""
        module = self._named(self.taps.latent)
        return None if isinstance(module, nn.Identity) else module

    @property
    def after(self) -> nn.Module | None:
        """The norm of what the feed-forward block adds."""
        return self._named(self.taps.after)

    @contextmanager
    def without_norm_after(self) -> Iterator[None]:
        """Inside the block, the norm of what is added hands on what it is given."""
        with ExitStack() as stack:
            if norm := self.after:
                hook = norm.register_forward_hook(lambda _, args, output: args[0])
                stack.callback(hook.remove)
            yield

    @property
    def streams(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What shifts and multiplies the stream where mixer and feed-forward block add to it,
        `[2,d]` each; for a number, `[2,1]`. Where they add to what their norms give, nothing is
        left of it."""
        if self.taps.added_factor:
            (width,) = self.ffn_norm.get_parameter("weight").shape
            return np.zeros((2, width), np.float32), np.zeros((2, width), np.float32)
        if self.taps.nth:
            shares = (1 - 1 / getattr(self.layer, name) for name in self.taps.nth)
            mixer, ffn = (np.array([[0], [share**0.5]], np.float32) for share in shares)
            return mixer, ffn
        if self.taps.layer_scale:
            scale = float(getattr(self.layer, self.taps.layer_scale))
            return None, np.array([[0], [scale]], np.float32)
        if self.taps.residuals is None:
            return None, None
        names = (self.taps.stream_bias, self.taps.stream_scale)
        mixer, ffn = (
            np.stack(
                [
                    self.layer.get_parameter(f"{path}.{name}").detach().numpy().copy()
                    for name in names
                ]
            )
            for path in self.taps.residuals
        )
        return mixer, ffn

    def _named(self, path: str) -> nn.Module | None:
        return dict(self.layer.named_modules()).get(path) if path else None

    def _of_class(self, ending: str) -> nn.Module | None:
        return next(
            (module for module in self.layer.modules() if type(module).__name__.endswith(ending)),
            None,
        )


class Tap:
    """One run of a decoder layer, of which a `piece` is listened to: its input, the hidden state
    between its blocks, its router, its output, and what it is handed and hands on beside them; and
    how large the sums get that are added to the hidden state, `width` channels."""

    def __init__(self, layer: nn.Module, taps: Taps, width: int, piece: int = 0):
        self.layer, self.piece, self._pieces = layer, piece, pieces(layer, taps)
        self.parts = TappedLayer(self._pieces[piece], taps)
        self.entering: Any = None  # what the embedding gave, where the model changes that first
        self.x: Any = None
        self.carried_in: Any = None
        self.middle: Any = None
        self.router: Any = None
        self.added: Any = None
        self.output: Any = None  # of the whole layer
        self.left: Any = None  # the hidden state after the piece, where more follow
        self.idle: Any = None  # what idle experts give
        self.later: Any = None  # what is added in the last piece
        own = known_matrices(self.parts.layer, taps, self.parts.experts)
        self.sums = PartialSums(width, own)

    def __enter__(self) -> "Tap":
        parts = self.parts
        self._handles = [
            self._entrance(self.piece).register_forward_pre_hook(self._hear_input),
            self.layer.register_forward_hook(
                lambda _, args, output: setattr(self, "output", output)
            ),
            *self._hear_pieces(),
        ]
        if not parts.is_mixer:
            self._handles.append(self._hear_middle())
        if parts.router is not None:
            self._handles.append(
                parts.router.register_forward_hook(
                    lambda _, args, output: setattr(self, "router", output)
                )
            )
        if parts.experts is not None and parts.block is not None:
            self._handles.append(self._hear_added(parts.block))
        self.sums.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sums.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def _entrance(self, piece: int) -> nn.Module:
        """What is given the hidden state before a piece."""
        view = self._pieces[piece]
        return next(view.children()) if self.parts.taps.pieces else view

    def _hear_pieces(self) -> Iterator[RemovableHandle]:
        if self.piece + 1 < len(self._pieces):
            yield self._entrance(self.piece + 1).register_forward_pre_hook(
                lambda _, args: setattr(self, "left", args[0])
            )
        if self.parts.taps.pieces:
            block = TappedLayer(self._pieces[0], self.parts.taps).block
            assert block is not None
            yield block.register_forward_hook(self._hear_later)

    def _hear_later(self, block: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        """What a block of experts gives to be added later, and what of it is idle experts'."""
        self.later = output[0]
        if self.router is not None:
            _, weights, chosen = self.parts.routed(self.router)
            experts: Any = self.parts.experts
            idle = (weights * (chosen >= experts.num_routed_experts)).sum(1, keepdim=True)
            self.idle = idle * given[0][0]

    def _hear_middle(self) -> RemovableHandle:
        parts = self.parts
        if beside := parts.taps.beside:
            return parts.layer.get_submodule(beside).register_forward_hook(
                lambda _, args, output: setattr(self, "middle", self.x + first_of(output)[0])
            )
        return parts.ffn_norm.register_forward_pre_hook(
            lambda _, args: setattr(self, "middle", args[0].reshape(-1, self.sums.width))
        )

    def _hear_added(self, block: nn.Module) -> RemovableHandle:
        """Before the norm of what is added, which may stand in the block; of experts alone where
        no block holds them, or they give a latent."""
        if (norm := self.parts.after) and block is not self.parts.experts:
            return norm.register_forward_pre_hook(
                lambda _, args: setattr(self, "added", args[0][0])
            )
        experts, latent = self.parts.experts, self.parts.latent
        adding, width = block, self.sums.width
        if latent is not None and experts is not None:
            adding, width = experts, cast(nn.Linear, latent).out_features
        return adding.register_forward_hook(
            lambda _, args, output: setattr(self, "added", first_of(output).reshape(-1, width))
        )

    def _hear_input(self, _layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.x = arguments[0][0]
        self.carried_in = arguments[1] if self.parts.taps.carry else None

    def golden(self) -> LayerGolden:
        last = self.output if self.left is None else self.left
        y, streams = first_of(last)[0], self.parts.streams
        middle = y if self.middle is None else self.middle
        return LayerGolden(
            self.x.numpy(),
            (middle - self.x).numpy(),
            (y - middle).numpy(),
            **self._routing(),
            **self._carries(),
            entering=None if self.entering is None else self.entering.numpy(),
            ffn_reads=self.x.numpy() if self.parts.taps.beside else None,
            attn_stream=streams[0],
            ffn_stream=streams[1],
            sums=np.array([self.sums.largest * self.parts.residual_multiplier], np.float32),
            inner=np.array([[self.sums.values, self.sums.ups, self.sums.hidden]], np.float32),
        )

    def _routing(self) -> dict[str, Any]:
        if self.router is None:
            return {}
        parts, taps, bias = self.parts, self.parts.taps, self.parts.choice_bias
        logits, weights, chosen = parts.routed(self.router)
        probs = SCORES[taps.score](logits)
        if taps.skip:
            chosen = chosen.masked_fill(weights == 0, probs.shape[1] - 1)
        changed = bool(taps.residuals or taps.after or taps.added_factor or parts.latent)
        apart = (self.added * parts.added_scale).numpy() if changed else None
        if self.idle is not None:
            apart = (self.added - self.idle).numpy()
        ranked = logits if taps.by_logits else probs
        scores = parts.ranked(ranked if bias is None else ranked + bias, chosen)
        return {
            "router_probs": probs.numpy(),
            "router_scores": None if scores is probs else scores.numpy(),
            "router_indices": chosen.numpy().astype(np.int32),
            "experts_delta": apart,
        }

    def _carries(self) -> dict[str, Any]:
        name = self.parts.taps.carry
        if self.parts.taps.pieces:
            side = {0: "carried_out", len(self._pieces) - 1: "carried_in"}.get(self.piece)
            (name,) = slot_arguments(LATER)
            return {side: {name: self.later.numpy()}} if side else {}
        if not name:
            return {}
        taken = {} if self.carried_in is None else {name: self.carried_in[0].numpy()}
        return {"carried_in": taken, "carried_out": {name: self.output[1][0].numpy()}}


def first_of(output: Any) -> Any:
    """What a module gives, or the first of what it gives."""
    return output[0] if isinstance(output, tuple) else output
