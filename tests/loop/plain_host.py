"""A host for conversions by the rules of docs/hosts.md alone: it reads runtime_meta.json and
embed.bin, calls functions through the runtime's interface, and imports nothing else of ours."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ane_moe.runtime import open_package

HIDDEN = np.float16(-1e4)
MEETING = ("sum", "mean")
Entry = Any  # (shard, function) of the manifest, or the number of a layer with dispatched experts


def root(port: dict) -> str:
    return port["slot"].split(".")[0].split("[")[0]


def columns(array: np.ndarray) -> np.ndarray:
    """(1, C, 1, T) or (1, C, T, 1) as (C, T), the same memory."""
    return array.reshape(array.shape[1], -1)


@dataclass
class Sum:
    """Calls, by their places in a lane, that put one slot together."""

    slot: str
    places: list[int]
    hows: list[str]
    total: Any = None

    @property
    def meets(self) -> bool:
        return any(how in MEETING for how in self.hows)

    @property
    def divisor(self) -> int:
        return sum(how != "add" for how in self.hows) if "mean" in self.hows else 1


@dataclass
class Lane:
    """Arrays by slot for calls of one width, zeros at first, and what is called with them."""

    tokens: int
    body: list[Entry]
    head: list[Entry]
    tail: list[Entry] = field(default_factory=list)
    slots: dict[str, np.ndarray] = field(default_factory=dict)


class Host:
    """One sequence of tokens through a conversion."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "runtime_meta.json").read_text())
        self.opened: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self.kept: dict[str, np.ndarray] = {}
        self.calls: list[tuple[str, str, dict, dict]] = []
        self.position, self.prompt = 0, None
        self.decode_lane = self.lane("decode")
        self.prompt_lane = self.lane("prefill") if self.meta["prefill"] else self.decode_lane

    # -- lanes: which functions are called, in the order of the manifest

    def lane(self, name: str) -> Lane:
        lane = Lane(self.meta["prefill"] if name == "prefill" else 1, [], [])
        for shard in self.meta["shards"]:
            functions = {function["name"]: function for function in shard["functions"]}
            if self.takes(shard, "ffn_input"):
                lane.body += [] if shard["layer"] in lane.body else [shard["layer"]]
            elif "tail" in functions:
                entry = (shard, functions["tail"])
                lane.tail.append(entry)
                lane.body += [entry] if name == "decode" else []
            else:
                gives = self.ports(shard["functions"][0])["outputs"]
                to = lane.head if any(root(p) == "logits" for p in gives) else lane.body
                to.append((shard, functions[name]))
        for entry in (*lane.body, *lane.head):
            if not isinstance(entry, int):
                ports = self.ports(entry[1])
                for port in (*ports["inputs"], *ports["outputs"]):
                    if root(port) != "state":
                        lane.slots.setdefault(port["slot"], np.zeros(port["shape"], np.float16))
        return lane

    def takes(self, shard: dict, slot: str) -> bool:
        return any(port["slot"] == slot for port in self.ports(shard["functions"][0])["inputs"])

    def ports(self, function: dict) -> dict:
        return self.meta["interfaces"][function["ports"]]

    # -- slots that the host fills

    def place(self, lane: Lane, position: int, count: int) -> None:
        own = np.arange(position, position + count)
        for slot, array in lane.slots.items():
            name, *arguments = slot.split("[")[0].split(".")
            if name == "mask":
                self.mask(array[0, 0], arguments[0], own)
            elif name in ("write", "keep"):
                array.fill(name == "keep")
                for token, cache in enumerate(own % array.shape[3]):
                    array[0, 0, token if name == "write" else 0, cache] = name == "write"
            elif name == "rope":
                table = self.meta["ropes"][arguments[0]]
                turn = np.cos if arguments[1] == "cos" else np.sin
                angles = np.outer(np.float64(table["inv_freq"]), own)
                rows = float(table["attention_factor"]) * turn(angles)
                array[0, 0, :, :count] = rows.astype(np.float16)
            elif name == "shift":
                array.fill(0)
                for column in range(int(arguments[0])):
                    array[0, 0, count + column, column] = 1
            elif name == "real":
                array.fill(0)
                array[..., :count] = 1
            elif name == "passed":
                array.fill(0)
                array[0, 0, 0, :count] = np.log1p((own + 1) // int(arguments[0]))
            elif name == "noise":
                array.fill(0)

    def mask(self, mask: np.ndarray, window: str, own: np.ndarray) -> None:
        """(T, S)"""
        mask.fill(HIDDEN)
        mask[len(own) :, 0] = 0
        for token, at in enumerate(own):
            seen = set(range(at + 1))
            kind, _, size = window.rpartition("_")
            if kind == "chunk":
                seen = {place for place in seen if place >= at - at % int(size)}
            elif window != "all":
                seen = {place for place in seen if place > at - int(size)}
            if kind == "prompt":
                seen |= set(range(at + 1 if self.prompt is None else min(self.prompt, at + 1)))
            mask[token, [place % mask.shape[1] for place in sorted(seen)]] = 0

    # -- calls

    def predict(self, shard: dict, function: dict, given: dict) -> dict:
        path, name = shard["path"], function["name"]
        if path not in self.opened:
            self.opened[path] = open_package(self.folder / path, "reference")
        if (path, name) not in self.opened:
            self.opened[path, name] = self.opened[path].function(name)
        loaded, state = self.opened[path, name], None
        if self.ports(function)["states"]:
            if path not in self.states:
                self.states[path] = loaded.make_state()
            state = self.states[path]
        outputs = loaded.predict(given, state)
        self.calls.append((path, name, given, outputs))
        return outputs

    def gather(self, function: dict, slots: dict) -> dict:
        given = {}
        for port in self.ports(function)["inputs"]:
            of_state = self.kept if root(port) == "state" else slots
            empty = np.zeros(port["shape"], np.float16)
            given[port["name"]] = of_state.setdefault(port["slot"], empty).copy()
        return given

    def run(self, entries: list[Entry], slots: dict, count: int) -> None:
        sums, place = self.sums(entries), 0
        while place < len(entries):
            if isinstance(entries[place], int):
                self.experts(entries[place], slots, count)
                place += 1
                continue
            begun = (one for one in sums if one.places[0] == place and not one.meets)
            together = next(begun, Sum("", [place], [])).places
            given = [self.gather(entries[one][1], slots) for one in together]
            outputs = [
                self.predict(*entries[one], inputs)
                for one, inputs in zip(together, given, strict=True)
            ]
            for one, found in zip(together, outputs, strict=True):
                self.put(entries[one][1], found, slots, sums, one)
            place = together[-1] + 1

    def sums(self, entries: list[Entry]) -> list[Sum]:
        found: dict[str, list[Sum]] = defaultdict(list)
        for place, entry in enumerate(entries):
            for port in [] if isinstance(entry, int) else self.ports(entry[1])["outputs"]:
                before = found[port["slot"]][-1] if found[port["slot"]] else None
                goes_on = before and (
                    port["how"] in MEETING
                    or (port["how"] == "add" and before.places[-1] == place - 1)
                )
                if before and goes_on:
                    before.places.append(place)
                    before.hows.append(port["how"])
                else:
                    found[port["slot"]].append(Sum(port["slot"], [place], [port["how"]]))
        every = [one for of_slot in found.values() for one in of_slot]
        return [one for one in every if len(one.places) > 1 or one.hows[0] == "add"]

    def put(self, function: dict, outputs: dict, slots: dict, sums: list[Sum], place: int) -> None:
        for port in self.ports(function)["outputs"]:
            slot, value = port["slot"], outputs[port["name"]]
            own = next((one for one in sums if one.slot == slot and place in one.places), None)
            if root(port) == "state":
                self.kept[slot] = value
            elif own is None:
                slots[slot][:] = value
            else:
                wide = np.float64 if own.meets else np.float32
                if place == own.places[0]:
                    start = slots[slot] if own.hows[0] == "add" else np.zeros_like(value)
                    own.total = start.astype(wide)
                own.total = own.total + value.astype(wide)
                if place == own.places[-1]:
                    slots[slot][:] = own.total / own.divisor

    def experts(self, layer: int, slots: dict, count: int) -> None:
        functions: dict[tuple[int, ...], dict[int, Any]] = defaultdict(dict)
        for shard in self.meta["shards"]:
            if shard["layer"] == layer and self.takes(shard, "ffn_input"):
                for function in shard["functions"]:
                    functions[tuple(function["experts"])][function["tokens"]] = shard, function
        gates = columns(slots[f"gates.{layer}"])[:, :count]
        entering = columns(slots["ffn_input"])[:, :count]
        some = next(iter(next(iter(functions.values())).values()))[1]
        stream = columns(slots[self.ports(some)["outputs"][0]["slot"]])[:, :count]
        total = stream.astype(np.float32)
        for experts in sorted(functions, key=lambda own: own or (1 << 30,)):
            chose = (gates[list(experts)] != 0).any(axis=0) if experts else np.ones(count, bool)
            tokens, sizes = np.flatnonzero(chose), sorted(functions[experts])
            for first in range(0, len(tokens), sizes[-1]):
                piece = tokens[first : first + sizes[-1]]
                size = min(one for one in sizes if one >= len(piece))
                shard, function = functions[experts][size]
                given = {}
                for port in self.ports(function)["inputs"]:
                    array = np.zeros(port["shape"], np.float16)
                    of = entering if root(port) == "ffn_input" else gates[list(experts)]
                    columns(array)[:, : len(piece)] = of[:, piece]
                    given[port["name"]] = array
                (y,) = self.predict(shard, function, given).values()
                total[:, piece] += columns(y)[:, : len(piece)]
        stream[:] = total

    # -- tokens

    def embed(self, ids: list[int]) -> np.ndarray:
        """(n, d) fp16"""
        vocab, d = self.meta["vocab"], self.meta["d_model"]
        data = (self.folder / self.meta["embed"]).read_bytes()
        if self.meta["embed_format"] == "fp16":
            return np.frombuffer(data, "<f2").reshape(vocab, d)[ids]
        rows = np.frombuffer(data, np.int8, vocab * d).reshape(vocab, d)[ids]
        scales = np.frombuffer(data, "<f2", vocab, vocab * d)[ids]
        return (rows.astype(np.float32) * scales[:, None]).astype(np.float16)

    def take_in(self, lane: Lane, ids: list[int]) -> None:
        self.place(lane, self.position, len(ids))
        stream = columns(lane.slots["stream"])
        stream[:] = 0
        stream[:, : len(ids)] = self.embed(ids).T
        self.run(lane.body, lane.slots, len(ids))
        self.position += len(ids)

    def logits(self) -> np.ndarray:
        """(V,) fp32, of the last token of the decode lane."""
        lane = self.decode_lane
        self.run(lane.head, lane.slots, 1)
        found = np.zeros(self.meta["vocab"], np.float32)
        for slot, array in lane.slots.items():
            if slot.startswith("logits["):
                first, end = slot[len("logits[") : -1].split(":")
                found[int(first) : int(end)] = columns(array)[:, 0]
        return found

    def take_prompt(self, ids: list[int]) -> np.ndarray:
        lane, decode = self.prompt_lane, self.decode_lane
        for first in range(0, len(ids), lane.tokens):
            last = ids[first : first + lane.tokens]
            self.take_in(lane, last)
        self.prompt = self.position
        if lane is not decode:
            column = columns(lane.slots["stream"])[:, len(last) - 1]
            columns(decode.slots["stream"])[:, 0] = column
            if lane.tail:
                self.place(decode, self.position - 1, 1)
                self.run(decode.tail, decode.slots, 1)
        return self.logits()

    def take_token(self, identifier: int) -> np.ndarray:
        self.take_in(self.decode_lane, [identifier])
        return self.logits()
