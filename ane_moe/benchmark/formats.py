"""Which of a chip's rates applies to a weight format, and what a weight takes in it."""

from ane_moe.compress.formats import FixedPalette, Format, Linear, Palette, Sparse
from ane_moe.compress.recipe import find_format

# Sparse weights: 1.55 to 1.64 times fp16 on an M1 was published (ane-guide, chapter 7); their bytes say as much.
RATES: dict[type[Format], str] = {Format: "fp16", Sparse: "fp16", Linear: "int8", Palette: "lut", FixedPalette: "lut"}
SIDE = 4096  # of the square matrix that stands for all when only bytes are known


def rate_of(name: str) -> str:
    """The rate class (chips.toml) of the format called `name`: fp16, int8 or lut. Raises UserError for no format."""
    return RATES[type(find_format(name))]


def bits_of(name: str) -> float:
    """Bits of a weight in the format called `name`, scales and palettes included. Raises UserError for no format."""
    return 8 * find_format(name).stored_bytes(SIDE, SIDE) / SIDE**2
