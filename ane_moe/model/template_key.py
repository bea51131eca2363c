"""What makes the graphs of two blocks differ, and the names in a package of several copies."""

from dataclasses import dataclass

from ane_moe.model.part import PartConfig
from ane_moe.model.routed import RoutedMixerConfig, RoutingConfig
from ane_moe.model.stack import StackConfig

# Whose functions are not all of the same.
PARTED = (StackConfig, RoutedMixerConfig, RoutingConfig)


@dataclass(frozen=True)
class TemplateKey:
    """What makes a graph distinct: the block, its functions as (name, tokens), and the axis order
    of its streams."""

    block: PartConfig
    functions: tuple[tuple[str, int], ...]
    layout: str = "bc1s"

    def block_of(self, name: str) -> PartConfig:
        """What of the block the function of this name goes through."""
        return self.block.of(name) if isinstance(self.block, PARTED) else self.block


def function_name(prefix: str, name: str) -> str:
    """What a package that holds a graph more than once calls the function `name` of the copy
    `prefix`."""
    return f"{prefix}_{name}" if prefix else name


def weight_name(prefix: str, name: str) -> str:
    """What tells the weight `name` of the copy `prefix` from those of other copies."""
    return f"{prefix}/{name}" if prefix else name
