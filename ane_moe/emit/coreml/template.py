"""A Core ML graph whose weights are still unbound."""

from dataclasses import dataclass

from ane_moe.model.port import Shape


@dataclass(frozen=True)
class Template:
    """A model specification with one `const` operation per weight still to be given its value.

    `model` is the serialised protobuf; `weights` maps each weight's name (the block's parameter
    path) to its shape.
    """

    model: bytes
    weights: dict[str, Shape]


def value_name(weight: str) -> str:
    """The program's name for a weight: a MIL identifier made of the block's parameter path, one to
    one."""
    return "w_" + weight.replace(".", "__")
