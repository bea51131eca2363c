"""The slots of a loop: one fp16 array each, made once; the host's own are filled by rules.

T = tokens in a call, S = cache width, d = d_model, r = rotated channels of a head, V = vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ane_moe.errors import UserError
from ane_moe.manifest import Manifest
from ane_moe.model.port import (
    BEFORE,
    PART,
    PASSED,
    Port,
    Shape,
    band_reach,
    chunk_size,
    prompt_window,
    slot_arguments,
)

# Additive mask of a slot that may not be seen; exp of it is 0 in fp16 and fp32.
HIDDEN = np.float16(-1e4)
MAX_ELEMENTS = 1 << 33  # of one slot: a manifest is not trusted

# Tables of a rotary embedding by their slot: rows of cosines and of sines, fp16 `[context, r/2]`.
Ropes = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Placement:
    """A call's real tokens: `count` of them from `position` on; what follows up to T is padding.
    `texts`: the lengths of several texts that share the call, each from position 0 on, one behind
    the other (none: it is one). `roster`: the tokens are one token, taken `count` times: all stand
    at `position` and see what precedes it, and each itself, in cache slots one behind the other;
    all but the first are written over by what comes next. `prompt`: the tokens of the prompt (None:
    all are)."""

    position: int
    count: int
    ropes: Ropes
    texts: tuple[int, ...] = ()
    roster: bool = False
    prompt: int | None = None

    @property
    def end(self) -> int:
        return self.position + self.count

    @property
    def parts(self) -> Iterator[slice]:
        """The columns of each text."""
        first = 0
        for length in self.texts or (self.count,):
            yield slice(first, first + length)
            first += length


def rope_tables(manifest: Manifest) -> dict[str, np.ndarray]:
    """Every rotary table of a conversion, for every position."""
    tables = {}
    for name, table in manifest.ropes.items():
        angles = np.arange(manifest.context, dtype=np.float64)[:, None] * np.asarray(
            table["inv_freq"], np.float64
        )
        factor = float(table["attention_factor"])
        tables[f"rope.{name}.cos"] = (factor * np.cos(angles)).astype(np.float16)
        tables[f"rope.{name}.sin"] = (factor * np.sin(angles)).astype(np.float16)
    return tables


def by_channel(array: np.ndarray) -> np.ndarray:
    """View `[1,C,1,T]` (bc1s) or `[1,C,T,1]` (bct1) as `[C,T]`; both hold the same bytes in the
    same order."""
    return array.reshape(array.shape[1], -1)


# -- rules of the host: how it fills a slot before a call
# ---------------------------------------------------------


def _mask(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, 1, T, S)`: open to each token itself and what precedes it inside the window, or what
    lies in a band around it, of its own text; padding sees cache slot 0, and is seen by nobody."""
    window, *_ = slot_arguments(slot)
    mask = array[0, 0]
    mask.fill(HIDDEN)
    mask[at.count :, 0] = 0
    if (reach := band_reach(window)) is not None:
        for part in at.parts:
            for token in range(part.start, part.stop):
                mask[token, max(part.start, token - reach) : min(token + reach + 1, part.stop)] = 0
        return
    for token in range(at.count):
        own = at.position if at.roster else at.position + token
        if prompt_window(window) is not None:
            mask[token, : own + 1 if at.prompt is None else min(at.prompt, own + 1)] = 0
        for part in _around(max(0, _first_seen(window, own)), own + 1, mask.shape[1]):
            mask[token, part] = 0
        if at.roster:
            mask[token, at.position % mask.shape[1]] = HIDDEN
            mask[token, (at.position + token) % mask.shape[1]] = 0


def _first_seen(window: str, own: int) -> int:
    """The first token that one of this position sees; what precedes the text does not count."""
    if window == "all":
        return 0
    if (size := chunk_size(window)) is not None:
        return own - own % size
    return own + 1 - (prompt_window(window) or int(window))


def _write(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, 1, T, S)`: one row per token with its 1 at the token's own cache slot; none for
    padding."""
    array.fill(0)
    for token in range(at.count):
        array[0, 0, token, (at.position + token) % array.shape[3]] = 1


def _keep(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, 1, 1, S)`: 0 at the cache slots that are written."""
    array.fill(1)
    for part in _around(at.position, at.end, array.shape[3]):
        array[..., part] = 0


def _around(first: int, end: int, slots: int) -> Iterator[slice]:
    """The cache slots of positions from `first` to before `end`: no more than there are, begun
    anew where they end."""
    start = first % slots
    stop = start + end - first
    yield slice(start, min(stop, slots))
    if stop > slots:
        yield slice(0, stop - slots)


def _rope(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, 1, r/2, T)`."""
    if at.roster:
        array[0, 0, :, : at.count] = at.ropes[slot][at.position][:, None]
        return
    for part in at.parts:
        rows = at.ropes[slot][at.position : at.position + part.stop - part.start]
        array[0, 0, :, part] = rows.T


def _shift(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, 1, n + T, n)`: picks the last n columns of a state and the call's tokens, padding left
    out."""
    (last,) = slot_arguments(slot)
    array.fill(0)
    for column in range(int(last)):
        array[0, 0, at.count + column, column] = 1


def _real(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, 1, 1, T)`: 1 for the call's tokens, 0 for padding."""
    array.fill(0)
    array[..., : at.count] = 1


def _noise(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, E, 1, T)`: none, until whoever takes samples puts it there (`loop/roster.py`)."""
    array.fill(0)


def _passed(array: np.ndarray, slot: str, at: Placement) -> None:
    """`(1, 1, 1, T)`: log(1 + n) for the n runs of tokens that end with a token or before, whole or
    with the part of one begun; or for all tokens before."""
    (steps,) = slot_arguments(slot)
    array.fill(0)
    positions = np.full(at.count, at.position) if at.roster else np.arange(at.position, at.end)
    if steps == BEFORE:
        array[0, 0, 0, : at.count] = np.log1p(positions)
        return
    runs = (positions + 1) / int(steps.removeprefix(PART))
    array[0, 0, 0, : at.count] = np.log1p(runs if steps.startswith(PART) else np.floor(runs))


Rule = Callable[[np.ndarray, str, Placement], None]
RULES: dict[str, Rule] = {
    "mask": _mask,
    "write": _write,
    "keep": _keep,
    "rope": _rope,
    "shift": _shift,
    "real": _real,
    "noise": _noise,
    PASSED: _passed,
}


class Slots:
    """The slots of calls of one width: an array for each, which keeps its place in memory."""

    def __init__(self, ropes: Ropes) -> None:
        self.count = 0  # real tokens of the call
        self._ropes = ropes
        self._arrays: dict[str, np.ndarray] = {}
        self._own: list[tuple[Rule, np.ndarray, str]] = []  # those that the host fills

    def array(self, port: Port) -> np.ndarray:
        """The array of a port's slot, zeros at first. Raises UserError when others have it in
        another shape."""
        array = self._arrays.get(port.slot)
        if array is None:
            _require_sound(port, self._ropes)
            array = self._arrays[port.slot] = np.zeros(port.shape, np.float16)
            if rule := RULES.get(port.root):
                self._own.append((rule, array, port.slot))
        if array.shape != port.shape:
            raise UserError(
                f"two functions have the slot {port.slot} in two shapes",
                f"{array.shape} and {port.shape}",
                "convert again",
            )
        return array

    def __contains__(self, slot: str) -> bool:
        return slot in self._arrays

    def columns(self, slot: str) -> np.ndarray:
        """A slot that functions fill, as `[C,T]`; the same memory."""
        return by_channel(self._arrays[slot])

    def place(
        self,
        position: int,
        count: int,
        texts: tuple[int, ...] = (),
        *,
        roster: bool = False,
        prompt: int | None = None,
    ) -> None:
        """Move the host's own slots to `count` tokens from `position` on, to `texts` of so many
        tokens, which see nothing of each other, or to one token taken `count` times. `prompt`: the
        tokens of the prompt, once it has been taken in."""
        self.count = count
        at = Placement(position, count, self._ropes, texts, roster, prompt)
        for rule, array, slot in self._own:
            rule(array, slot, at)


def _require_sound(port: Port, ropes: Ropes) -> None:
    if port.root == "rope" and port.slot not in ropes:
        raise UserError(
            f"a function reads the unknown rotary table {port.slot}", do="convert again"
        )
    if np.prod(port.shape, dtype=np.float64) > MAX_ELEMENTS:
        raise UserError(f"the slot {port.slot} is too large", str(port.shape), "convert again")


def zeros(shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """States that hold nothing yet."""
    return {slot: np.zeros(shape, np.float16) for slot, shape in shapes.items()}
