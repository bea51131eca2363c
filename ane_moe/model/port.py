"""Ports: what a function takes and gives, and the places of the host where each comes from or goes.

A slot is a named place of the host, as text `root.argument.argument`. Functions and the host meet
in slots alone: whoever runs a model fills a function's input slots, calls it, and puts its outputs.

    stream                  residual stream, (1, d, 1, T)
    added                   what experts give where a norm comes after their sum, or a mixer whose
                            layer's other half reads the stream as it was, (1, d, 1, T); of experts
                            that work on a latent as wide as that
    stream.track_1          that of track 1 until the next meeting
    ffn_input  gates.3      what dispatched experts are given: the normed stream, or a latent of it,
                            and gates of layer 3
    ffn_input.track_1       that of track 1
    weight.up.weight        and, where one graph computes all of them, their own weights
    carry.router            what a layer hands to the next one beside the stream
    carry.later             what experts give for a later layer to add
    guess.3                 scores of a later layer's experts, by the shard that chooses those of 3
    noise.gumbel.3          what is added to layer 3's scores of experts for the choice alone
    logits[0:16384]         scores of these vocabulary rows
    state.3.k_cache         what layer 3 keeps from call to call
    mask.all  mask.17       additive mask of what a token may see: all before it, or 17 with itself
    mask.band_128           or 128 on either side of it
    mask.prompt_17          all before it in a prompt; after that the prompt, and 17 with itself
    mask.chunk_64           or those before it in its own run of 64
    rope.main.cos           rows of a rotary table
    write  keep             one-hot rows for the cache slots of the call's tokens; the untouched
    slots
    write.ring_64           the same, and mask.17.ring_64, for caches of 64 slots that are begun
    anew at their end
    shift.2                 one-hot columns that keep the last 2 real tokens of a state and a call
    real                    1 for the tokens of a call, 0 for padding
    passed.64               log(1 + n) for n whole runs of 64 tokens up to each token
    passed.part_64          the same, with the part of a run begun
    passed.before           log(1 + n) for the n tokens before each

The last six and noise are made by the host, by rules of `loop/buffers.py`; functions fill the
others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Shape = tuple[int, ...]
How = Literal["set", "add", "sum", "mean"]

STREAM = "stream"
FFN_INPUT = "ffn_input"
ADDED = "added"
LATER = "carry.later"
MASK, BAND, CHUNK, PROMPT = "mask", "band_", "chunk_", "prompt_"
PASSED, PART, BEFORE, SHIFT = "passed", "part_", "before", "shift"
GATES, GUESS, LOGITS, STATE, WEIGHT = "gates", "guess", "logits", "state", "weight"  # roots
MEETING = ("sum", "mean")  # how outputs of tracks go into one slot
# Roots of the slots whose arrays have channels on axis 1 and tokens on the last: `--layout` turns
# those, and nothing else.
BY_CHANNEL = ("stream", "added", "ffn_input", "gates", "guess", "carry", "logits")


@dataclass(frozen=True)
class Port:
    """A named input, output or state of a function, fp16.

    `how` an output goes into its slot: it is `set`, or `add`ed. What functions that follow each
    other add goes to what the first of them sets, or to what was there, and all of them read the
    slot as it was before: the sum is in fp32 and rounded once. With `sum` and `mean` tracks meet
    in a slot that the first of them sets; what runs between reads it as it was before.
    """

    name: str
    shape: Shape
    slot: str
    how: How = "set"

    @cached_property
    def root(self) -> str:
        """The kind of slot: `mask` of `mask.17`."""
        return slot_root(self.slot)

    @property
    def by_channel(self) -> bool:
        return self.root in BY_CHANNEL

    def at(self, layers: Sequence[int], rows: tuple[int, int] | None) -> "Port":
        """The port of a function that stands in the model: `{0}` in a part's slot is the first of
        its layers, `{rows}` its rows of the vocabulary."""
        span = "{}:{}".format(*rows) if rows else ""
        return replace(self, slot=self.slot.format(*layers, rows=span))

    def turned(self) -> "Port":
        """With tokens before the last axis, where it has channels: the layout bct1."""
        if not self.by_channel:
            return self
        one, channels, height, tokens = self.shape
        return replace(self, shape=(one, channels, tokens, height))


@dataclass(frozen=True)
class Ports:
    """`states` are Core ML states: passed like inputs, but read and written in place, with no
    output of their own."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[Port, ...] = ()

    def __iter__(self) -> Iterator[Port]:
        return iter((*self.inputs, *self.outputs, *self.states))

    def through(self, entering: str, leaving: str, how: How) -> "Ports":
        """With the stream taken from one slot and given to another; what would set that goes there
        in another way."""
        inputs = (replace(p, slot=entering) if p.slot == STREAM else p for p in self.inputs)
        outputs = (
            replace(p, slot=leaving, how=how if p.how == "set" else p.how)
            if p.slot == STREAM
            else p
            for p in self.outputs
        )
        return replace(self, inputs=tuple(inputs), outputs=tuple(outputs))

    def renamed(self, slot: str, other: str) -> "Ports":
        """With another slot in the place of one."""

        def bound(ports: tuple[Port, ...]) -> tuple[Port, ...]:
            return tuple(replace(p, slot=other) if p.slot == slot else p for p in ports)

        return Ports(bound(self.inputs), bound(self.outputs), bound(self.states))

    def at(self, layers: Sequence[int], rows: tuple[int, int] | None, layout: str) -> "Ports":
        """As a function of a conversion has them; see `Port.at` and `Port.turned`."""

        def bound(ports: tuple[Port, ...]) -> tuple[Port, ...]:
            placed = (port.at(layers, rows) for port in ports)
            return tuple(port.turned() if layout == "bct1" else port for port in placed)

        return Ports(bound(self.inputs), bound(self.outputs), bound(self.states))


def beside_ports(stream: Port, parallel: bool, takes: bool = False) -> tuple[Port, ...]:
    """What a feed-forward block takes beside the `stream` where the mixer is `parallel` to it, or
    where it `takes` what earlier experts gave."""
    slots = {"added": ADDED} if parallel else {"later": LATER} if takes else {}
    return tuple(replace(stream, name=name, slot=slot) for name, slot in slots.items())


def track_slot(slot: str, track: int) -> str:
    """The one that a track has in the place of this one."""
    return f"{slot}.track_{track}"


def shapes_of(ports: Iterable[Port]) -> dict[str, Shape]:
    """Shapes by name."""
    return {port.name: port.shape for port in ports}


def slot_root(slot: str) -> str:
    return slot.split(".")[0].split("[")[0]


def slot_arguments(slot: str) -> list[str]:
    """`main` and `cos` of `rope.main.cos`."""
    return slot.split(".")[1:]


def band_reach(window: str) -> int | None:
    """128 of `band_128`, the argument of a mask; None of another one."""
    return int(window.removeprefix(BAND)) if window.startswith(BAND) else None


def chunk_size(window: str) -> int | None:
    """64 of `chunk_64`, the argument of a mask; None of another one."""
    return int(window.removeprefix(CHUNK)) if window.startswith(CHUNK) else None


def prompt_window(window: str) -> int | None:
    """17 of `prompt_17`, the argument of a mask; None of another one."""
    return int(window.removeprefix(PROMPT)) if window.startswith(PROMPT) else None


def slot_rows(slot: str) -> tuple[int, int]:
    """The first row, and the one after the last, that `logits[0:16384]` names."""
    first, _, end = slot.partition("[")[2].rstrip("]").partition(":")
    return int(first), int(end)
