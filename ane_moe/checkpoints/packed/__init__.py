"""Forms of quantised checkpoints, a file each: which tensors are codes, and what they mean.

The folder is the registry. A form takes the tensors that it knows out of those of a checkpoint, and
puts one in their place that has the plain tensor's name and gives its numbers (coded.py).
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from ane_moe.checkpoints.packed.facts import quantisation_facts
from ane_moe.checkpoints.stored_tensor import StoredTensor

SHARED = {"facts", "group"}


class Form(Protocol):
    """What a form's module offers."""

    NAME: str

    def plain(
        self, facts: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> Iterator[tuple[tuple[str, ...], dict[str, StoredTensor]]]:
        """The tensors that belong together, by their names, and what stands in their place. `facts`
        are what the checkpoint says of its quantisation. Raises UserError for sizes that do not
        agree."""


def forms() -> list[Form]:
    names = sorted(module.name for module in iter_modules(__path__) if module.name not in SHARED)
    return [cast(Form, import_module(f"{__name__}.{name}")) for name in names]


def plain_tensors(
    config: Mapping[str, Any], side: Mapping[str, Any], tensors: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors with the codes of every known form decoded, and the names of the forms found.

    `side` is the content of a file that says how weights were quantised where `config` does not.
    Costs no reading beyond a few bytes a tensor.
    """
    facts, found = quantisation_facts(config, side), []
    for form in forms():
        groups = list(form.plain(facts, tensors))
        if not groups:
            continue
        found.append(form.NAME)
        taken = {name for names, _ in groups for name in names}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in taken}
        for _, plain in groups:
            tensors |= plain
    return tensors, found
