"""Hugging Face's own model, one layer in memory at a time.

The model is built on the meta device; each part (embedding, one decoder layer, head) is filled
through transformers' own key mapping and tensor conversion, used for every prompt, and emptied
again. The model's own `forward` drives it:
parts that are not loaded are replaced by stand-ins that hand on what the real part returned in its
turn, so masks, positions and multipliers are all computed by Hugging Face's code.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.checkpoints.coded import stored_bytes
from ane_moe.checkpoints.left_out import is_beside
from ane_moe.checkpoints.weight_file import RemoteFile
from ane_moe.errors import UserError
from ane_moe.families import load_family
from ane_moe.families.quantised import quantisation
from ane_moe.original import afm as afm  # register themselves with transformers
from ane_moe.original import mm1_moe as mm1_moe
from ane_moe.original import omni_moe as omni_moe
from ane_moe.original import pt_moe as pt_moe
from ane_moe.original.widened import NARROW, stacks, widened

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Experts one by one, each with gate and up together: a form that transformers itself does not read.
SINGLE_PAIR = re.compile(r"\.experts\.\d+\.gate_up_proj$")
SINGLE_PAIRS = [
    WeightConverter(
        f"experts.*.{matrix}$", f"experts.{matrix}", operations=[MergeModulelist(dim=0)]
    )
    for matrix in ("gate_up_proj", "down_proj")
]


class Tensors(Protocol):
    """Where a model's weights come from: the configuration, and tensors by name. A tensor may have
    two names; `origins` tells which are the same."""

    folder: Path
    config: dict[str, Any]
    origins: dict[str, str]
    dtypes: dict[str, torch.dtype]

    def opened(self, names: Collection[str]) -> AbstractContextManager[dict[str, Any]]:
        """Tensors, or what gives them for `[...]`, by name, for the length of the block."""
        ...


class OriginalTensors:
    """The tensors of a checkpoint, each by the name in its file, which transformers may know, then
    by that of key_names.py."""

    def __init__(self, checkpoint: Checkpoint):
        self.folder, self.config, self._made = checkpoint.folder, checkpoint.config, checkpoint.made
        tensors = checkpoint.tensors
        self._stored = {tensor.key: tensor for tensor in tensors.values()} | tensors
        keys = {tensor.key: name for name, tensor in tensors.items()}
        self._known_as = keys | {name: name for name in tensors}
        self.origins = {name: tensor.key for name, tensor in self._stored.items()}
        self.dtypes = {
            name: DTYPES.get(tensor.dtype, torch.float32) for name, tensor in self._stored.items()
        }

    @contextmanager
    def opened(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        with ExitStack() as stack:
            stored = [self._stored[name] for name in names]
            paths = {tensor.path for tensor in stored if not tensor.made}
            files = sorted(path for path in paths if isinstance(path, Path))
            opened = {
                file: stack.enter_context(safe_open(file, "pt", backend="pread")) for file in files
            }
            yield {name: self._opened(opened, name) for name in names}

    def _opened(self, files: Mapping[Path, Any], name: str) -> Any:
        tensor = self._stored[name]
        if tensor.made:
            return torch.from_numpy(self._made(self._known_as[name]))
        if isinstance(tensor.path, RemoteFile):
            stored = torch.from_numpy(stored_bytes(tensor, 0, tensor.size))
            return stored.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
        return files[tensor.path].get_slice(tensor.key)


# transformers' classes, by the module that gives scores; the first that knows a configuration is
# that of all it describes.
CLASSES: dict[str, tuple[Any, ...]] = {
    "lm_head": (AutoModelForImageTextToText, AutoModelForCausalLM),
    "score": (AutoModelForTokenClassification,),
}


class StreamedModel:
    """A language model, or a token classifier, in fp32, eager attention and eager experts, whose
    weights come and go by part. Experts stay as narrow as they are stored (widened.py).

    Raises UserError for a folder that is not a checkpoint, a quantised one, and missing or
    misshapen tensors.
    """

    def __init__(self, tensors: Tensors):
        self.folder = tensors.folder
        whole = _config(tensors)
        self.config = whole.get_text_config()
        self.taps = load_family(whole.model_type).TAPS
        whole = getattr(whole, self.taps.inside) if self.taps.inside else whole
        with torch.device("meta"):
            self.model = (
                _class(self.taps.head, whole)
                .from_config(
                    whole,
                    dtype=torch.float32,
                    attn_implementation="eager",
                    experts_implementation="eager",
                    trust_remote_code=False,
                )
                .eval()
            )
        base = self.model.base_model
        # Llama 4's causal model has no module of the name that it says its base has.
        self.base: Any = self.model.model if base is self.model else base
        self.decoder: Any = getattr(self.base, "language_model", self.base)
        self.layers: nn.ModuleList = getattr(self.decoder, self.taps.layers)
        _without_idle(self.layers)
        self._mapping: list[Any] = get_model_conversion_mapping(self.model)
        if any(SINGLE_PAIR.search(name) for name in tensors.origins):
            self._mapping += SINGLE_PAIRS
        self._tensors = tensors
        self._patterns: dict[str, str] = {}  # of a converter, by the name that it matched
        self._sources = self._target_sources()
        self._parts = self._split_targets()
        self._stacks = self._narrow_stacks()
        self._apart = {path: parts for path in self._stacks if (parts := self._parts_of(path))}
        self._held: dict[str, list[list[torch.Tensor]]] = {}
        _fill_computed_buffers(self.model)
        self._load("rest")

    @contextmanager
    def loaded(self, part: str) -> Iterator[None]:
        """Hold the weights of `embed`, `head` or `layer N` inside the block."""
        own = {path: owner for path, owner in self._stacks.items() if path in self._parts[part]}
        self._load(part)
        try:
            with widened(own, self._held):
                yield
        finally:
            self._held.clear()
            for target in self._parts[part]:
                module, _, name = target.rpartition(".")
                owner = self.model.get_submodule(module)
                setattr(
                    owner, name, nn.Parameter(getattr(owner, name).to("meta"), requires_grad=False)
                )

    def reads(self, index: int) -> tuple[int, ...]:
        """The layers whose outputs a layer is given, or (the number after the last) the head: the
        one before, -1 being the embedding, unless the model says otherwise."""
        if hasattr(self.decoder, "reads"):
            return tuple(self.decoder.reads(index))
        return (index - 1,)

    @property
    def count(self) -> int:
        """The number of layers, as ours are counted."""
        return len(self.layers) * self.taps.each

    def module(self, key: str) -> nn.Module:
        """What has a tensor of the checkpoint, whatever that is called there."""
        origins = self._tensors.origins
        targets = (
            target
            for target, names in self._sources.items()
            if any(origins[name] == origins[key] for name in names)
        )
        return self.model.get_submodule(next(targets).rpartition(".")[0])

    def together(self, outputs: Sequence[Any]) -> Any:
        """What becomes of the outputs that a layer `reads`."""
        return self.decoder.meet(outputs) if len(outputs) > 1 else outputs[0]

    @contextmanager
    def stand_ins(self, outputs: dict[nn.Module, Any]) -> Iterator[None]:
        """Inside the block, each module named returns the value given instead of running."""
        with ExitStack() as stack:
            for module, output in outputs.items():
                module.forward = _returning(output)
                stack.callback(delattr, module, "forward")
            yield

    def _target_sources(self) -> dict[str, list[str]]:
        """Model tensor -> the checkpoint tensors it is made of, by transformers' own renaming."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix, known = self.model.base_model_prefix, self.model.state_dict()
        sources: dict[str, list[str]] = {}
        taken = set()  # keys in the files
        for key, origin in self._tensors.origins.items():
            target, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if target not in known and key in known:
                target = key
            if target in known and origin not in taken:
                sources.setdefault(target, []).append(key)
                taken.add(origin)
                if pattern is not None:
                    self._patterns[key] = pattern
        return sources

    def _parts_of(self, path: str) -> list[list[str]] | None:
        """The names of a stack's parts, by expert, where all that is done to them is to lay them
        one below the other and to stack experts: that needs no copy. None for other stacks."""
        by_pattern: dict[str, list[str]] = {}
        for name in sorted(self._sources[path], key=dot_natural_key):
            by_pattern.setdefault(self._patterns.get(name, ""), []).append(name)
        for entry in self._mapping:
            if isinstance(entry, WeightConverter) and by_pattern.keys() == {*entry.source_patterns}:
                done = [(type(one), getattr(one, "dim", None)) for one in entry.operations]
                if done in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
                    return [by_pattern[pattern] for pattern in entry.source_patterns]
        return None

    def _narrow_stacks(self) -> dict[str, nn.Module]:
        """The experts' stacks that are stored in one narrow type, made ready to be loaded in it."""
        narrow = {}
        for path, owner in stacks(self.model).items():
            dtypes = {self._tensors.dtypes[name] for name in self._sources.get(path, ())}
            if len(dtypes) == 1 and dtypes <= {*NARROW}:
                name, (dtype,) = path.rpartition(".")[2], dtypes
                meta = owner.get_parameter(name).to(dtype)
                setattr(owner, name, nn.Parameter(meta, requires_grad=False))
                narrow[path] = owner
        return narrow

    def _split_targets(self) -> dict[str, list[str]]:
        """Every tensor of the model by the part it belongs to; tied tensors belong to both ends."""
        names = {id(module): name for name, module in self.model.named_modules()}
        ends = {
            "embed": names[id(self.model.get_input_embeddings())] + ".",
            "head": f"{self.taps.head}.",
        }
        layers = names[id(self.layers)] + "."
        parts: dict[str, list[str]] = {part: [] for part in ("rest", *ends)}
        for target in self.model.state_dict():
            if is_beside(target):  # the towers of another kind of input, which nothing reads here
                continue
            owners = [part for part, start in ends.items() if target.startswith(start)]
            if target.startswith(layers):
                owners = [f"layer {target.removeprefix(layers).split('.')[0]}"]
            for owner in owners or ["rest"]:
                parts.setdefault(owner, []).append(target)
        for target, source in self.model.all_tied_weights_keys.items():
            for part in ends:
                if target in parts[part] or source in parts[part]:
                    parts[part] = sorted({*parts[part], target, source})
        return parts

    def _load(self, part: str) -> None:
        """Fill one part, tensor by tensor, so that no more than one converted tensor is held
        twice."""
        targets = self._parts[part]
        missing = {target for target in targets if target not in self._sources}
        names = [name for target in targets for name in self._sources.get(target, ())]
        try:
            with self._tensors.opened(names) as opened:
                for target in sorted({*targets} - missing):
                    own = {name: opened.pop(name) for name in self._sources[target]}
                    if not self._hold(target, own):
                        self._load_target(own)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.folder}: {part} cannot be read",
                str(error),
                "download the checkpoint again",
            ) from None
        missing = {target for target in missing if not self._is_filled(target)}
        tied = self.model.all_tied_weights_keys
        if any(target in tied or target in tied.values() for target in targets):
            self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        if missing:
            raise UserError(
                f"{self.folder} lacks tensors of the model",
                ", ".join(sorted(missing)[:3]),
                "download the checkpoint again",
            )

    def _is_filled(self, target: str) -> bool:
        """Whether a tensor without sources of its own came with another, or is one that
        transformers too does without: a bias of zeros."""
        module, _, name = target.rpartition(".")
        owner = self.model.get_submodule(module)
        lacking = self.model._keys_to_ignore_on_load_missing or ()
        if name in owner._buffers and any(re.search(pattern, target) for pattern in lacking):
            setattr(owner, name, torch.zeros(getattr(owner, name).shape))
        return not getattr(owner, name).is_meta

    def _hold(self, target: str, tensors: Mapping[str, Any]) -> bool:
        """Take a stack as it is stored, expert by expert; False where it cannot be, or its parts do
        not fit the model."""
        if target not in self._apart:
            return False
        parts = [[tensors[name][...] for name in part] for part in self._apart[target]]
        sizes = [{tuple(one.shape) for one in part} for part in parts]
        experts, rows, columns = self.model.get_parameter(target).shape
        alike = all(len(part) == experts for part in parts) and all(len(one) == 1 for one in sizes)
        found = [size for one in sizes for size in one]
        if not alike or {size[1:] for size in found} != {(columns,)}:
            return False
        if sum(size[0] for size in found) != rows:
            return False
        self._held[target] = parts
        return True

    def _load_target(self, tensors: dict[str, Any]) -> None:
        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            tensors,
            LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._mapping),
        )
        wrong = [
            f"{name} is {tuple(found)}, the model needs {tuple(needed)}"
            for name, found, needed in info.mismatched_keys
        ]
        wrong += [
            f"{name}: {text.splitlines()[-1]}" for name, text in info.conversion_errors.items()
        ]
        if wrong:
            raise UserError(
                f"{self.folder} has tensors that do not fit the model",
                wrong[0],
                "check config.json against the weights",
            )


def _config(tensors: Tensors) -> Any:
    if form := quantisation(tensors.config):
        raise UserError(
            f"{tensors.folder} is quantised ({form})",
            do="take the fp16, bf16 or fp32 checkpoint",
        )
    try:
        values = deepcopy(tensors.config)  # transformers rewrites what it is given
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # the configuration classes raise what they like
        raise UserError(
            f"{tensors.folder} is not a checkpoint that transformers can read",
            f"{type(error).__name__}: {error}",
            "give a folder with config.json and *.safetensors",
        ) from None


def _class(head: str, config: Any) -> Any:
    return next(one for one in CLASSES[head] if type(config) in one._model_mapping)


def _fill_computed_buffers(model: Any) -> None:
    """Rotary tables and the like are not stored: transformers' own initialisation computes them."""
    for module in model.modules():
        computed = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        for name in computed:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if computed:
            model._init_weights(module)


def _without_idle(layers: nn.Module) -> None:
    """Take out the rows that LongcatFlashExperts has of matrices for experts that compute nothing:
    no file has them, and nothing reads them."""
    for module in layers.modules():
        if getattr(module, "zero_expert_num", 0):
            own = module.get_parameter("gate_up_proj")[: module.num_routed_experts]
            module.gate_up_proj = nn.Parameter(own, requires_grad=False)


def _returning(output: Any) -> Any:
    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output

    return forward
