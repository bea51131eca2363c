"""Which matrix gets which weight format: a preset, a format for all, or a TOML file.

```toml
about = "..."

[roles]                     # the most specific entry counts
default = "int8"
experts = "lut4"
"experts.down" = "int8"
attention = { format = "lut4", rank = 16 }
shared = { format = "lut4", rank = 0.01 }  # of the matrix's shorter side

[[layers]]                  # for some layers, over the above
layers = "0-1"
roles = { experts = "int8" }
```

With `bits = 3.56` and `below = "lut3"` before the tables, as many matrices get `below` in place of
their format as it takes to store the model at that rate (formats/mixture.py).

`embedding` is the table that the host reads: fp16 unless it is named, as int8; `default` is not for
it. Routers, norms, gates of shared experts and biases stay fp16.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ane_moe.errors import UserError
from ane_moe.formats.as_stored import parse_as_stored
from ane_moe.formats.encoders import AS_STORED, Format, parse_format
from ane_moe.model.weight import WeightName
from ane_moe.number_lists import parse_layers

PRESETS = Path(__file__).parent / "recipes"
MAX_FILE_BYTES = 1 << 20
MAX_RANK = 1024
WHOLE = ("fp16", AS_STORED)  # which no directions are kept apart of
EMBEDDING_FORMATS = ("fp16", "int8")  # of which the host makes single rows
# A role is named by group and matrix; the rows of a part say which of them a tensor has
# (`Weight.role`).
MATRICES = {
    "attention": "qkvo",
    "experts": ("gate", "up", "down"),
    "shared": ("gate", "up", "down"),
    "latent": ("in", "out"),
    "dense": ("gate", "up", "down"),
    "head": (),
    "embedding": (),
}
NAMES = {
    "default",
    *MATRICES,
    *(f"{group}.{matrix}" for group, names in MATRICES.items() for matrix in names),
}


@dataclass(frozen=True)
class Choice:
    """How one matrix is stored. `rank` singular directions are kept apart in fp16 (0: none; below
    1: that share of its shorter side)."""

    format: str = "fp16"
    rank: float = 0

    def directions(self, shape: tuple[int, ...]) -> int:
        """How many are kept apart of a matrix of this shape: never more than half of them."""
        side = min(shape)
        return min(int(self.rank * side if self.rank < 1 else self.rank), side // 2)


@dataclass(frozen=True)
class Mixture:
    """Matrices get the format `below` until all take `bits` bits a weight."""

    bits: float
    below: str


@dataclass(frozen=True)
class LayerRoles:
    """Choices by role for some layers."""

    layers: tuple[int, ...]
    roles: Mapping[str, Choice]


@dataclass(frozen=True)
class Recipe:
    """Choices by role, and by layer and role; formats of single tensors (`overrides`, by our tensor
    name). A `mixture` comes to be overrides once the tensors are known."""

    name: str
    roles: Mapping[str, Choice]
    layers: tuple[LayerRoles, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    mixture: Mixture | None = None

    def choice(self, name: WeightName, role: str | None) -> Choice:
        """What the tensor `name` gets, which has this role."""
        if role is None:
            return Choice()
        by_role = self.by_role(role, name.layer)
        return replace(by_role, format=self.overrides.get(str(name), by_role.format))

    def by_role(self, role: str, layer: int | None = None) -> Choice:
        """What the tensors of a role get, in one layer: the most specific entry."""
        tables = [entry.roles for entry in reversed(self.layers) if layer in entry.layers]
        names = (role,) if role == "embedding" else (role, role.split(".")[0], "default")
        entries = (
            table[name] for table in (*tables, self.roles) for name in names if name in table
        )
        return next(entries, Choice())

    def as_json(self) -> dict[str, Any]:
        """The recipe as it is kept in runtime_meta.json."""
        return {
            "roles": {name: vars(choice) for name, choice in self.roles.items()},
            "layers": [
                {
                    "layers": list(entry.layers),
                    "roles": {n: vars(c) for n, c in entry.roles.items()},
                }
                for entry in self.layers
            ],
            "overrides": dict(self.overrides),
        }

    def of_stored(self, name: WeightName, role: str | None) -> bool:
        """Whether the tensor `name` is to be carried over as the checkpoint has it."""
        return role is not None and self.by_role(role, name.layer).format == AS_STORED

    @property
    def formats(self) -> tuple[str, ...]:
        """Every weight format that a package may hold (the host reads the embedding)."""
        tables = (self.roles, *(entry.roles for entry in self.layers))
        choices = (choice for table in tables for choice in _packaged(table))
        mixed = {self.mixture.below} if self.mixture else set()
        chosen = {choice.format for choice in choices}
        return tuple(sorted(chosen | mixed | set(self.overrides.values())))

    @property
    def leaving_engine(self) -> tuple[str, ...]:
        """Of these, the formats that take a whole model off the engine."""
        return tuple(name for name in self.formats if find_format(name).leaves_engine)


def _packaged(table: Mapping[str, Choice]) -> list[Choice]:
    return [choice for role, choice in table.items() if role != "embedding"]


@cache
def find_format(name: str) -> Format:
    """The format of a name that a recipe or a conversion has, remembered. Raises UserError."""
    return parse_as_stored(name) or parse_format(name)


def recipe_of(name: str, data: Mapping[str, Any]) -> Recipe:
    """The recipe that runtime_meta.json keeps (`Recipe.as_json`). Raises UserError when it is
    none."""
    try:
        roles = {role: Choice(**choice) for role, choice in data["roles"].items()}
        layers = tuple(
            LayerRoles(tuple(entry["layers"]), {r: Choice(**c) for r, c in entry["roles"].items()})
            for entry in data["layers"]
        )
        return Recipe(name, roles, layers, dict(data["overrides"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "the recipe in runtime_meta.json cannot be read", repr(error), "convert again"
        ) from None


def presets() -> tuple[str, ...]:
    """Names of the built-in recipes."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.toml")))


def find_recipe(
    text: str, *, group: str | None = None, vector: int | None = None, rank: int | None = None
) -> Recipe:
    """The recipe of a preset's name, a format's name, or the path of a TOML file.

    `group` and `vector` are for palettes whose names do not say; `rank` replaces that of every
    compressed matrix. Raises UserError.
    """
    if rank is not None and not 0 <= rank <= MAX_RANK:
        raise UserError("--recover-rank is not possible", str(rank), f"give 0 to {MAX_RANK}")
    if text in presets():
        recipe = _read(PRESETS / f"{text}.toml", text)
    elif text.endswith(".toml"):
        recipe = _read(Path(text), Path(text).stem)
    else:
        recipe = Recipe(text, {"default": Choice(parse_format(text).name)})
    return _completed(recipe, group, vector, rank)


def _completed(recipe: Recipe, group: str | None, vector: int | None, rank: int | None) -> Recipe:
    def complete(choice: Choice) -> Choice:
        name = choice.format
        if found := re.fullmatch(r"(lut\d)(\+scale)?", name):
            size = {None: "", "tensor": "-tensor"}.get(group, f"-g{group}")
            name = found[1] + size + (f"-v{vector}" if vector else "") + (found[2] or "")
        return Choice(
            parse_format(name).name, choice.rank if rank is None or name in WHOLE else rank
        )

    roles = {
        name: complete(choice) if name != "embedding" else choice
        for name, choice in recipe.roles.items()
    }
    layers = tuple(
        LayerRoles(e.layers, {n: complete(c) for n, c in e.roles.items()}) for e in recipe.layers
    )
    mixture = recipe.mixture
    if mixture:
        mixture = replace(mixture, below=complete(Choice(mixture.below)).format)
    # Whether the recipe is named after a format.
    plain = recipe.name == recipe.roles.get("default", Choice()).format
    return Recipe(
        roles["default"].format if plain else recipe.name,
        roles,
        layers,
        recipe.overrides,
        mixture,
    )


def _read(path: Path, name: str) -> Recipe:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"the recipe {path} is too large", f"{path.stat().st_size} bytes")
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the recipe {path} cannot be read", str(error.strerror)) from None
    except ValueError as error:
        raise UserError(f"the recipe {path} is not TOML", str(error)) from None
    if unknown := set(data) - {"about", "roles", "layers", "bits", "below"}:
        raise UserError(
            f"the recipe {path} has unknown entries",
            ", ".join(sorted(unknown)),
            "use roles, layers, bits and below",
        )
    entries = data.get("layers", [])
    if not isinstance(entries, list):
        raise UserError(
            f"the recipe {path}: layers is not a list of tables", "", "write [[layers]]"
        )
    layers = tuple(_layer_roles(entry, path) for entry in entries)
    return Recipe(name, _roles(data.get("roles"), path), layers, mixture=_mixture(data, path))


def _mixture(data: Mapping[str, Any], path: Path) -> Mixture | None:
    if not {"bits", "below"} & set(data):
        return None
    bits: Any = data.get("bits")
    below = data.get("below")
    if type(bits) not in (int, float) or not 0 < bits <= 16 or not isinstance(below, str):
        raise UserError(
            f"the recipe {path}: bits is a number up to 16, and below a format",
            f"bits {bits!r}, below {below!r}",
            'write, say, bits = 3.56 and below = "lut3"',
        )
    return Mixture(float(bits), parse_format(below).name)


def _layer_roles(entry: Any, path: Path) -> LayerRoles:
    if (
        not isinstance(entry, dict)
        or set(entry) != {"layers", "roles"}
        or not isinstance(entry["layers"], str)
    ):
        raise UserError(
            f"the recipe {path}: a [[layers]] table needs layers and roles", repr(entry)
        )
    return LayerRoles(parse_layers(entry["layers"]), _roles(entry["roles"], path))


def _roles(table: Any, path: Path) -> dict[str, Choice]:
    if not isinstance(table, dict) or not table:
        raise UserError(
            f"the recipe {path} has no table of roles",
            do='write [roles] and, say, default = "int8"',
        )
    if unknown := set(table) - NAMES:
        raise UserError(
            f"the recipe {path} names unknown roles",
            ", ".join(sorted(unknown)),
            f"roles are {', '.join(sorted(NAMES))}",
        )
    roles = {name: _choice(value, path) for name, value in table.items()}
    embedding = roles.get("embedding", Choice())
    if embedding.format not in EMBEDDING_FORMATS or embedding.rank:
        raise UserError(
            f"the recipe {path}: the embedding is stored as {' or '.join(EMBEDDING_FORMATS)}",
            f"{embedding.format}, rank {embedding.rank}",
        )
    return roles


def _choice(value: Any, path: Path) -> Choice:
    fields = {"format": value} if isinstance(value, str) else value
    if (
        not isinstance(fields, dict)
        or not set(fields) <= {"format", "rank"}
        or "format" not in fields
    ):
        raise UserError(
            f"the recipe {path}: a role is a format, or a table of format and rank", repr(value)
        )
    form, rank = fields["format"], fields.get("rank", 0)
    whole = type(rank) is int and 0 <= rank <= MAX_RANK
    if not isinstance(form, str) or not (whole or (type(rank) is float and 0 < rank < 1)):
        raise UserError(
            f"the recipe {path}: format is a name and rank 0 to {MAX_RANK}, or a share below 1",
            repr(value),
        )
    if form == AS_STORED and rank:
        raise UserError(f"the recipe {path}: {AS_STORED} keeps no directions apart", repr(value))
    return Choice(parse_format(form).name, rank)


FP16 = Recipe("fp16", {"default": Choice("fp16")})
INT8 = Recipe("int8", {"default": Choice("int8")})
