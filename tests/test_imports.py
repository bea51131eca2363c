"""Who may import whom: the flow goes from left to right, and nothing comes back."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ane_moe"

# A room and what it must not know of. A room of executing knows packages and a manifest only:
# a conversion runs where no checkpoint, and nothing that made it, is at hand.
MADE_WITH = ("families", "parts", "formats", "emit", "conversion", "checkpoints", "opened")
FORBIDDEN = {
    "mlprogram": (*MADE_WITH, "runtime", "loop", "manifest"),
    "runtime": (*MADE_WITH, "loop", "manifest"),
    "loop": MADE_WITH,
    "redaction": (*MADE_WITH, "torch", "transformers", "report", "commands"),
    "serve": (*MADE_WITH, "original", "torch", "transformers", "commands"),
    "conversion": ("verification", "benchmark", "report"),
    "parts": ("families", "emit", "conversion"),
    "formats": ("families", "parts", "emit", "conversion"),
    "model": ("parts", "checkpoints", "torch", "transformers"),
    "families": ("parts", "torch", "transformers"),
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Every name a file imports, also inside functions: `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def owner(name: str) -> str | None:
    """The module of ours that a name belongs to: itself, or the one that defines it."""
    return next((m for m in (name, name.rpartition(".")[0]) if m in MODULES), None)


def room(module: str) -> str:
    """`ane_moe.loop.session` is in the room `loop`; a file of the root is its own."""
    return [*module.split("."), ""][1]


IMPORTS = {name: imported(path) for name, path in MODULES.items()}
NEEDS = {name: {m for m in map(owner, names) if m and m != name} for name, names in IMPORTS.items()}


def test_no_circle_among_modules() -> None:
    order = list(TopologicalSorter(NEEDS).static_order())  # CycleError names a circle
    assert len(order) == len(MODULES) > 200


def test_no_circle_among_rooms() -> None:
    rooms: dict[str, set[str]] = {}
    for module, needs in NEEDS.items():
        rooms.setdefault(room(module), set()).update(map(room, needs - {"ane_moe"}))
    between = {name: needs - {name} for name, needs in rooms.items()}
    assert len(list(TopologicalSorter(between).static_order())) > 20


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_room_does_not_know_what_lies_against_the_flow(name: str) -> None:
    inside = [module for module in MODULES if room(module) == name]
    assert inside
    reached = {
        (module, other)
        for module in inside
        for other in IMPORTS[module]
        for forbidden in FORBIDDEN[name]
        if f"{other}.".startswith((f"ane_moe.{forbidden}.", f"{forbidden}."))
    }
    assert not reached


def test_an_import_inside_a_function_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "lazy.py"
    path.write_text("def f():\n    from ane_moe.loop import session\n    import torch\n")
    assert imported(path) == {"ane_moe.loop.session", "torch"}
