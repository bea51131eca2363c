"""Calibration by Hugging Face's own model, one layer in memory at a time.

What enters attention, the feed-forward blocks and the head is heard from the running model. What
enters an expert's `down` is computed here from the expert's own weights, for the tokens that chose
it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.errors import UserError
from ane_moe.formats.calibration import Calibration
from ane_moe.model.spec import MlpSpec, ModelSpec, MoeSpec
from ane_moe.model.weight import HEAD, WeightName
from ane_moe.opened import Model
from ane_moe.original.capture import Walk
from ane_moe.original.golden import LayerGolden
from ane_moe.original.prompts import builtin_prompts, check_prompts, cut_passages, read_prompts
from ane_moe.original.ranges import range_of
from ane_moe.original.stream import OriginalTensors, StreamedModel
from ane_moe.original.tap import Tap, TappedLayer
from ane_moe.progress import Progress, silent
from ane_moe.quiet_transformers import quiet_transformers

PASSAGE = 512  # tokens of the text that run together
MAX_TOKENS = 16_384


def calibration_digest(checkpoint: Checkpoint, text: Path | None) -> str:
    """Tells two calibrations apart: the model's configuration, its weights' sizes, and the text.
    Raises UserError when the text cannot be read."""
    shapes = sorted((key, tensor.shape) for key, tensor in checkpoint.tensors.items())
    facts = json.dumps([checkpoint.config, shapes], sort_keys=True)
    sha = hashlib.sha256(facts.encode())
    try:
        sha.update(text.read_bytes() if text else b"builtin")
    except OSError as error:
        raise UserError(
            f"{text} cannot be read", str(error.strerror), "give a text file, or `builtin`"
        ) from None
    return sha.hexdigest()


def calibrate(model: Model, text: Path | None, progress: Progress | None = None) -> Calibration:
    """Run the model over a text file (None: the built-in prompts) and collect what enters its
    matrices.

    The text is parted as for prompts and cut into passages of 512 tokens, 16,384 in all. Raises
    UserError for a bad checkpoint, and for a text that gives no tokens.
    """
    with quiet_transformers():
        stream = StreamedModel(OriginalTensors(model.checkpoint))
        passages = _passages(model.checkpoint.folder, text, model.spec)
        check_prompts(passages, model.spec.vocab, model.spec.context)
        collector = _Collector(model, stream)
        walk = Walk(stream, passages)
        for index, taps in walk.layers(range(stream.count), progress or silent):
            collector.visit(index, taps)
        final_energy = collector.head(walk.final())
    tokens, of = sum(map(len, passages)), calibration_digest(model.checkpoint, text)
    return Calibration(
        collector.moments,
        collector.counts,
        collector.energies,
        collector.ranges,
        final_energy,
        tokens,
        of,
    )


def _passages(checkpoint: Path, text: Path | None, spec: ModelSpec) -> list[list[int]]:
    if text is None:
        return builtin_prompts(checkpoint, spec.vocab, spec.context)
    return cut_passages(read_prompts(text, checkpoint), min(PASSAGE, spec.context), MAX_TOKENS)


class _Collector:
    """Means of squares by activation, and counts by layer, as the layers pass."""

    def __init__(self, model: Model, stream: StreamedModel):
        self._model, self._stream = model, stream
        self._heard: dict[int, dict[WeightName, list[torch.Tensor]]] = {}
        self.moments: dict[WeightName, np.ndarray] = {}
        self.counts: dict[int, np.ndarray] = {}
        self.energies: dict[int, np.ndarray] = {}
        self.ranges: dict[int, np.ndarray] = {}
        for number, layer in enumerate(model.spec.layers):
            heard = self._heard[number] = {}
            for row in layer.mixer.rows(model.spec.d_model) if layer.mixer else ():
                name = WeightName(number, "attn", None, row.path)
                if (
                    row.reads and name.beside(row.reads) not in heard
                ):  # one of those that read it says it
                    inputs = heard[name.beside(row.reads)] = []
                    module = stream.module(model.sources[name].key)
                    module.register_forward_pre_hook(_Ear(inputs))

    @torch.no_grad()
    def visit(self, index: int, taps: list[Tap]) -> None:
        """Take in one layer, while it is loaded."""
        for name, inputs in self._heard.pop(index).items():
            self.moments[name] = _mean_squares(torch.cat(inputs))
        goldens = [tap.golden() for tap in taps]
        reached = [range_of(index, golden) for golden in goldens]
        self.ranges[index] = np.array([astuple(one)[1:] for one in reached]).max(0)
        added = [
            np.concatenate([getattr(golden, name) for golden in goldens])
            for name in ("attn_delta", "ffn_delta")
        ]
        self.energies[index] = np.array(
            [(delta.astype(np.float64) ** 2).sum(1).mean() for delta in added]
        )
        read = torch.from_numpy(np.concatenate([golden.read_by_ffn for golden in goldens]))
        x = taps[0].parts.ffn_norm(read[None])[0]  # (N, d)
        ffn = self._model.spec.layers[index].ffn
        if ffn is None:
            return
        if isinstance(ffn, MlpSpec):
            self._mlp(WeightName(index, "ffn", None, ""), "mlp.", x, ffn)
            return
        chosen = np.concatenate(
            [golden.router_indices for golden in goldens if golden.router_indices is not None]
        )
        self.counts[index] = np.bincount(chosen.reshape(-1), minlength=ffn.router.classes)
        gates = torch.from_numpy(np.concatenate([one.router_probs for one in goldens]))
        given = self._given(index, taps[0].parts, x, goldens)
        for expert in range(ffn.router.experts):
            if self.counts[index][expert]:
                took_it = torch.from_numpy((chosen == expert).any(1))
                own = given[took_it]
                if ffn.expert.gate_enters:
                    own = own * gates[took_it, expert, None]
                self._mlp(WeightName(index, "ffn", expert, ""), "", own, ffn.expert)
        if isinstance(ffn, MoeSpec) and ffn.shared is not None:
            self._mlp(WeightName(index, "ffn", None, ""), "shared.", x, ffn.shared.mlp)
        if isinstance(ffn, MoeSpec) and ffn.beside is not None:
            own = taps[0].parts.layer.get_submodule(taps[0].parts.taps.beside_norm)(read)
            self._mlp(WeightName(index, "ffn", None, ""), "beside.mlp.", own, ffn.beside)

    @torch.no_grad()
    def head(self, carried: list[torch.Tensor]) -> float:
        """Take in what enters the head; the mean squared length of the hidden state before it."""
        last = torch.cat([one[0] if isinstance(one, tuple) else one for one in carried], dim=1)
        self.moments[HEAD.beside("x")] = _mean_squares(self._final_norm(last)[0])
        return float(last[0].double().square().sum(-1).mean())

    def _final_norm(self, x: torch.Tensor) -> torch.Tensor:
        key = self._model.sources[HEAD.beside("norm.weight")].key
        return cast(torch.Tensor, self._stream.module(key)(x))

    def _mlp(self, part: WeightName, prefix: str, x: torch.Tensor, spec: MlpSpec) -> None:
        def projected(matrix: str) -> torch.Tensor:
            y = x @ self._weight(part.beside(f"{prefix}{matrix}.weight")).T
            return y + self._weight(part.beside(f"{prefix}{matrix}.bias")) if spec.inner_bias else y

        self.moments[part.beside("x")] = _mean_squares(x)
        if spec.squared:
            hidden = projected("up").relu().square()
        else:
            hidden = _activated(projected("gate"), projected("up"), spec)
        self.moments[part.beside(f"{prefix}hidden")] = _mean_squares(hidden)

    def _given(
        self, index: int, parts: TappedLayer, x: torch.Tensor, goldens: Sequence[LayerGolden]
    ) -> torch.Tensor:
        """What experts are given for the normed stream `(N, d)`: that, or a latent of it `(N, r)`.
        What enters the projections around a latent is taken in: the stream, and the sum of what
        experts give."""
        if parts.latent is None:
            return x
        part = WeightName(index, "ffn", None, "")
        mixed = [one.experts_delta for one in goldens if one.experts_delta is not None]
        self.moments[part.beside("x")] = _mean_squares(x)
        self.moments[part.beside("mixed")] = _mean_squares(torch.from_numpy(np.concatenate(mixed)))
        latent: torch.Tensor = parts.latent(x)
        return latent

    def _weight(self, name: WeightName) -> torch.Tensor:
        source = self._model.sources[name]
        return torch.from_numpy(self._model.checkpoint.read(source)).float() / source.scale


def _activated(gate: torch.Tensor, up: torch.Tensor, spec: MlpSpec) -> torch.Tensor:
    clamp = spec.clamp
    if spec.activation == "gelu":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    if spec.limit is not None:
        gated = torch.nn.functional.silu(gate).clamp(max=spec.limit)
        return gated * up.clamp(-spec.limit, spec.limit)
    if clamp is None:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return torch.sigmoid(clamp.alpha * gate) * gate * (up + 1)


class _Ear:
    """A hook that keeps what a module is given, `(N, columns)`."""

    def __init__(self, heard: list[torch.Tensor]):
        self._heard = heard

    def __call__(self, _module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._heard.append(arguments[0].detach().flatten(0, -2))


def _mean_squares(x: torch.Tensor) -> np.ndarray:
    moments: np.ndarray = x.float().square().mean(0).numpy()
    return moments
