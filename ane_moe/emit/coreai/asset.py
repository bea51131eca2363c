"""`.aimodel`: bind weights to templates and write the asset, atomically.

One asset has the functions of every copy of a template in it (see `emit/coreml/package.py`), each
an entry point; a weight that several of them use lies in it once. An asset is a folder: main.mlirb
(the program and its weights), main.hash (sha256 of that) and metadata.json. It appears under its
final name only when it is complete. Apple's Python packages are betas of one fixed version: what is
used of their inside is used here and in `expansions.py` alone.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ane_moe.emit.coreai.bytecode import DO, read_arrays
from ane_moe.emit.coreai.expansions import Held, constant, expanded, resource
from ane_moe.emit.coreai.told import Arrays, by_name, told_of, weight_of
from ane_moe.emit.coreml.package import ContentKey, Weight, Written, extent
from ane_moe.emit.coreml.template import Template, value_name
from ane_moe.errors import UserError
from ane_moe.files import disk_error, replaced, sha256
from ane_moe.formats.encoded import Encoded, Expansion, Stored
from ane_moe.json_file import read_json
from ane_moe.model.template_key import function_name, weight_name
from ane_moe.package_form import DIGEST, METADATA, PROGRAM
from ane_moe.runtime.coreai.installed import core_ai, quiet

FACTS = "ane_moe"  # of what whoever makes an asset may say in its metadata
# What metadata of another shape than ours gives.
UNFIT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
NAME = "coreai.name"  # of an input, as the runtime calls it


@dataclass(frozen=True)
class _Bound:
    """A weight as the asset holds it: one attribute, or those of its expansions; and what its
    metadata tells of it."""

    told: Any
    plain: Any = None
    expansions: tuple[tuple[Expansion, Held], ...] = ()

    def value(self) -> Any:
        return expanded(self.expansions) if self.expansions else constant(self.plain)


def stamp_asset(
    templates: Mapping[str, Template],
    values: Iterable[tuple[str, Weight]],
    key: ContentKey,
    path: Path,
    shared: Mapping[str, str] | None = None,
    writer: str = "",
) -> Written:
    """Write the asset `path` from templates of Core AI by prefix and their weights, as `stamp` of
    `emit/coreml/package.py` does. All weights of one asset are in memory at a time, as stored.

    Raises UserError when the disk is full; an interrupted call leaves nothing at `path`.
    """
    authoring, ir = core_ai("coreai.authoring"), core_ai("coreai._compiler.ir")
    assets = core_ai("coreai.authoring.asset")
    context = authoring.Context()._mlir_context
    try:
        with replaced(path, writer) as temporary, context, ir.Location.unknown(), quiet():
            bound = _bound(values, templates, shared or {})
            module = _module(templates, bound)
            content_key = key.digest()
            temporary.parent.mkdir(parents=True, exist_ok=True)
            assets.AIProgram._from_mlir_module(module).save_asset(temporary)
            _say(bound, content_key, temporary / METADATA)
            files = {name: sha256(temporary / name) for name in (DIGEST, METADATA)}
            files[PROGRAM] = (temporary / DIGEST).read_bytes().hex()
    except (OSError, RuntimeError) as error:
        raise disk_error(error, path) from error
    return Written(content_key, files)


def read_asset_key(path: Path) -> str | None:
    """The content key of an asset of ours, or None when there is no such asset."""
    try:
        return str(_facts(path)["content_key"])
    except (UserError, *UNFIT):
        return None


def read_weights(
    path: Path, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Weight]]:
    """The weights of an asset of ours that are `wanted`, by the names that they were stamped with,
    as it stores them. Raises UserError for another asset, or one that is damaged."""
    arrays = by_name(read_arrays(path / PROGRAM))
    for name, told in _weights_of(path).items():
        if wanted(name):
            try:
                yield name, weight_of(told, arrays)
            except UNFIT as error:
                raise _unsaid(path, error) from None


def weight_names(path: Path) -> tuple[str, ...]:
    """The names of an asset's weights. Raises UserError as `read_weights` does."""
    return tuple(_weights_of(path))


def _weights_of(path: Path) -> dict[str, Any]:
    try:
        return dict(_facts(path)["weights"])
    except UNFIT as error:
        raise _unsaid(path, error) from None


def _facts(path: Path) -> Any:
    return read_json(path / METADATA)["creatorDefinedMetadata"][FACTS]


def _unsaid(path: Path, error: Exception) -> UserError:
    found = f"{type(error).__name__}: {error}"
    return UserError(f"{path} says nothing of its weights", found, DO)


def _say(bound: Mapping[str, _Bound], content_key: str, path: Path) -> None:
    """Add to the metadata, and make it the same for the same input: the converter notes the time,
    and has no order of its own."""
    about = json.loads(path.read_text())
    about.pop("creationDate", None)
    weights = {name: one.told for name, one in bound.items()}
    about["creatorDefinedMetadata"] = {FACTS: {"content_key": content_key, "weights": weights}}
    path.write_text(json.dumps(about, sort_keys=True) + "\n")


def _bound(
    values: Iterable[tuple[str, Weight]],
    templates: Mapping[str, Template],
    shared: Mapping[str, str],
) -> dict[str, _Bound]:
    """Attributes by weight name. Checks that each weight of each copy comes once, with as many
    elements as traced."""
    shapes = {
        weight_name(prefix, name): shape
        for prefix, template in templates.items()
        for name, shape in template.weights.items()
    }
    bound: dict[str, _Bound] = {}
    arrays = Arrays()
    for name, value in values:
        size, type_ = extent(value)
        if size != math.prod(shapes[name]) or type_ != "fp16" or name in bound:
            raise ValueError(f"weight {name}: {type_}, {size} elements, for {shapes[name]}")
        bound[name] = _held(value, shapes[name], arrays)
    for name, other in shared.items():
        if name in bound or shapes[name] != shapes[other]:
            raise ValueError(f"weight {name}: {shapes[name]}, cannot be {other} {shapes[other]}")
        bound[name] = bound[other]
    if missing := shapes.keys() - bound.keys():
        raise ValueError(f"no value for {sorted(missing)[:5]}")
    return bound


def _held(value: Weight, shape: tuple[int, ...], arrays: Arrays) -> _Bound:
    if not isinstance(value, Encoded):
        plain = arrays.add(Stored(value.reshape(shape), "fp16"))
        return _Bound(plain.told, resource(plain))
    told, expansions = [], []
    for expansion in value.expansions:
        packed = {
            part: arrays.add(array)
            for part, array in expansion.inputs.items()
            if isinstance(array, Stored)
        }
        told.append(told_of(expansion, packed))
        expansions.append((expansion, {part: resource(one) for part, one in packed.items()}))
    return _Bound(told, expansions=tuple(expansions))


def _module(templates: Mapping[str, Template], bound: Mapping[str, _Bound]) -> Any:
    """One module with the functions of every copy."""
    ir = core_ai("coreai._compiler.ir")
    parsed = {id(one): ir.Module.parse(one.model.decode()) for one in templates.values()}
    module = ir.Module.create()
    for prefix, template in templates.items():
        mine = {value_name(name): bound[weight_name(prefix, name)] for name in template.weights}
        used: set[str] = set()
        for graph in parsed[id(template)].body.operations:
            copy = graph.operation.clone(ip=ir.InsertionPoint(module.body))
            name = function_name(prefix, graph.attributes["sym_name"].value)
            copy.attributes["sym_name"] = ir.StringAttr.get(name)
            used |= _bind(copy, mine)
        if used != mine.keys():
            raise ValueError(f"unbound weights: {sorted(mine.keys() - used)[:5]}")
    return module


def _bind(graph: Any, weights: Mapping[str, _Bound]) -> set[str]:
    """Put constants in the place of a graph's inputs that are weights. Returns which it has."""
    ir = core_ai("coreai._compiler.ir")
    block, about = graph.regions[0].blocks[0], list(graph.attributes["arg_attrs"])
    names = [ir.StringAttr(one[NAME]).value for one in about]
    with ir.InsertionPoint.at_block_begin(block):
        for place, name in enumerate(names):
            if name in weights:
                block.arguments[place].replace_all_uses_with(weights[name].value())
    for place in reversed(range(len(names))):
        if names[place] in weights:
            block.erase_argument(place)
    kept = [one for one, name in zip(about, names, strict=True) if name not in weights]
    graph.attributes["arg_attrs"] = ir.ArrayAttr.get(kept)
    declared = ir.TypeAttr(graph.attributes["function_type"]).value
    inputs = [argument.type for argument in block.arguments]
    kind = ir.FunctionType.get(inputs, list(declared.results))
    graph.attributes["function_type"] = ir.TypeAttr.get(kind)
    return weights.keys() & set(names)
