"""A model of our parts in fp32 torch, straight from a checkpoint: whether an architecture is
understood can be told to six digits, without a conversion.

The parts get what the host gives them, by the host's own rules, in calls of several tokens and of
one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ane_moe.checkpoints.checkpoint import TensorSource, open_checkpoint
from ane_moe.conversion.plan import ConvertOptions
from ane_moe.conversion.planner import make_plan
from ane_moe.families import describe, load_family
from ane_moe.families.keys import find_tensors
from ane_moe.formats.recipe import FP16
from ane_moe.loop.buffers import RULES, Placement
from ane_moe.model.port import Port
from ane_moe.model.spec import ModelSpec
from ane_moe.model.weight import EMBEDDING
from ane_moe.parts.unbound import build_unbound

PREFILL = 8  # tokens of a call


class TorchModel:
    """The plan's own blocks, with their weights in fp32. `spec` may differ from the checkpoint's:
    what a wrong one computes."""

    def __init__(self, folder: Path, spec: ModelSpec | None = None, **options: object):
        checkpoint = open_checkpoint(folder)
        true, sources = describe(checkpoint)
        self.spec = spec or true
        files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        stored = {key: tensor for file in files for key, tensor in file.items()}
        self._tensors = {name: stored[one.key] for name, one in checkpoint.tensors.items()}
        if spec is not None:
            shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
            sources = find_tensors(spec, shapes, load_family(spec.family).KEYS)
        self._sources = sources
        self.plan = make_plan(
            self.spec, sources, ConvertOptions(context=64, state="explicit", recipe=FP16, **options)
        )
        self._embedding = self._read(sources[EMBEDDING])
        self._blocks = [(shard, self._block(shard)) for shard in self.plan.shards]
        self._ropes = {
            f"rope.{name}.{part}": value
            for name, rope in self.spec.ropes.items()
            for part, value in self._table(rope).items()
        }

    def _table(self, rope) -> dict[str, np.ndarray]:
        angles = np.arange(self.plan.context)[:, None] * np.asarray(rope.inv_freq)
        factor = rope.attention_factor
        return {"cos": factor * np.cos(angles), "sin": factor * np.sin(angles)}

    def _read(self, source: TensorSource) -> torch.Tensor:
        """As Checkpoint.read, in fp32."""
        array = self._tensors[source.key].float().numpy()
        array = array if source.index is None else array[source.index]
        array = array if source.rows is None else array[slice(*source.rows)]
        array = source.arranged(np.ascontiguousarray(array)).reshape(source.shape)
        array = (array + np.float32(source.offset)) * np.float32(source.scale)
        return torch.from_numpy(np.ascontiguousarray(array))

    def _block(self, shard):
        block = build_unbound(next(iter(shard.graphs.values())).block)
        block = block.to_empty(device="cpu")
        values = {}
        for name, source in shard.sources.items():
            if isinstance(source, TensorSource):
                values[name] = self._read(source)
            else:
                values[name] = torch.eye(source.columns)[source.first : source.first + source.rows]
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(values[name].reshape(parameter.shape))
        return block.eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int], prefill: int = PREFILL, prefilled: int = 16) -> np.ndarray:
        """Of all tokens `[N,V]`: `prefilled` in calls of `prefill`, the rest one by one."""
        self._kept: dict[str, torch.Tensor] = {}
        self.gates: dict[str, list[np.ndarray]] = {}
        rows, position = [], 0
        while position < len(ids):
            tokens = prefill if position < prefilled else 1
            count = min(tokens, len(ids) - position)
            rows.append(self._call(ids[position : position + count], position, tokens))
            position += count
        return np.concatenate(rows)

    def _call(self, ids: Sequence[int], position: int, tokens: int) -> np.ndarray:
        slots = {"stream": torch.zeros(1, self.spec.d_model, 1, tokens)}
        slots["stream"][0, :, 0, : len(ids)] = self._embedding[list(ids)].T
        placement = Placement(position, len(ids), self._ropes)
        logits: list[torch.Tensor] = []
        added_to: dict[str, torch.Tensor] = {}
        for shard, block in self._blocks:
            layers = shard.layers or (() if shard.layer is None else (shard.layer,))
            ports = block.ports(tokens).at(layers, shard.rows, "bc1s")
            given = {port.name: self._input(port, slots, placement) for port in ports.inputs}
            adds = any(port.how == "add" for port in ports.outputs)
            if adds and added_to:  # it reads what the first of them read
                given["x"] = added_to["stream"]
            elif "stream" in slots and shard.scope != "head":
                added_to = {"stream": slots["stream"]}
            outputs = block(**given)
            for port in ports.outputs:
                value = outputs[port.name]
                if port.root == "logits":
                    logits.append(value)
                elif port.root == "state":
                    self._kept[port.slot] = value
                else:
                    slots[port.slot] = slots[port.slot] + value if port.how == "add" else value
                    if port.root == "gates":
                        self.gates.setdefault(port.slot, []).append(
                            value[0, :, 0, : len(ids)].T.numpy()
                        )
        return torch.cat(logits, dim=1)[0, :, 0, : len(ids)].T.numpy()

    def _input(self, port: Port, slots, placement: Placement) -> torch.Tensor:
        if port.root in RULES:
            array = np.zeros(port.shape, np.float32)
            RULES[port.root](array, port.slot, placement)
            return torch.from_numpy(array)
        if port.root == "state":
            return self._kept.get(port.slot, torch.zeros(port.shape))
        return slots[port.slot]
