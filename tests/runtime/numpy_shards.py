"""Shards made of numpy functions, and the same decoder written a second way: over the whole text at
once, without a cache, in fp64. The two agree when a session places, masks, caches and adds as it
should."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ane_moe.errors import UserError
from ane_moe.loop.buffers import rope_tables
from ane_moe.loop.expert_cache import ExpertCache
from ane_moe.loop.experts import expert_layers
from ane_moe.loop.shards import LoadedShard, LoadedShards, call_order
from ane_moe.manifest import Manifest, Shard, ShardFunction
from ane_moe.mlprogram.program import Feature, TensorType
from ane_moe.model.port import FFN_INPUT, STREAM, Port, Ports, shapes_of

D, HEADS, DIM, EXPERTS, WIDTH, VOCAB = 12, 2, 6, 5, 7, 41
INV_FREQ = (1.0, 0.13)  # four of six channels are rotated


@dataclass
class NumpyFunction:
    """A LoadedFunction over a Python callable taking (inputs, state)."""

    call: object
    shapes: dict
    state_shapes: dict = field(default_factory=dict)
    outputs: tuple = ()

    @property
    def inputs(self):
        return tuple(
            Feature(name, TensorType("fp16", shape)) for name, shape in self.shapes.items()
        )

    @property
    def states(self):
        return tuple(
            Feature(name, TensorType("fp16", shape)) for name, shape in self.state_shapes.items()
        )

    def make_state(self):
        return {name: np.zeros(shape, np.float16) for name, shape in self.state_shapes.items()}

    def predict(self, inputs, state=None):
        assert {name: array.shape for name, array in inputs.items()} == self.shapes
        assert all(array.dtype == np.float16 for array in inputs.values())
        return self.call(inputs, state)


@dataclass
class Decoder:
    """Random weights; `windows` gives each layer's attention window. With all experts chosen (the
    default of `k`) the function is continuous, so that fp16 cannot turn a near tie into another
    answer than fp64's."""

    windows: tuple
    k: int = EXPERTS
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)

        def matrix(*shape):
            return rng.normal(size=shape).astype(np.float16).astype(np.float64) / np.sqrt(shape[-1])

        self.embed = rng.normal(size=(VOCAB, D)).astype(np.float16)
        self.head = matrix(VOCAB, D)
        self.layers = [
            dict(
                q=matrix(HEADS * DIM, D),
                k=matrix(HEADS * DIM, D),
                v=matrix(HEADS * DIM, D),
                o=matrix(D, HEADS * DIM),
                router=matrix(EXPERTS, D),
                up=matrix(EXPERTS, WIDTH, D),
                down=matrix(EXPERTS, D, WIDTH),
            )
            for _ in self.windows
        ]

    def logits(self, ids):
        """Reference: fp64, whole text, no cache. `[T,V]`."""
        x = self.embed[list(ids)].astype(np.float64).T
        t = np.arange(len(ids))
        angles = np.asarray(INV_FREQ)[:, None] * t
        for w, window in zip(self.layers, self.windows, strict=True):
            seen = (t[None, :] <= t[:, None]) & (t[:, None] - t[None, :] < (window or len(ids)))
            q, k, v = (((w[n] @ norm(x)).reshape(HEADS, DIM, -1)) for n in "qkv")
            q, k = (rotate(a, np.cos(angles), np.sin(angles)) for a in (q, k))
            scores = np.where(seen, np.einsum("hct,hcs->hts", q, k), -np.inf)
            x = x + w["o"] @ np.einsum("hts,hcs->hct", softmax(scores), v).reshape(HEADS * DIM, -1)
            x = x + sum(
                expert(w, e, norm(x)) * gates(w, norm(x), self.k)[e] for e in range(EXPERTS)
            )
        return (self.head @ norm(x)).T


def norm(x):
    return x / np.sqrt((x * x).mean(0, keepdims=True) + 1e-6)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(a, cos, sin):
    half = len(INV_FREQ)
    first, second, rest = a[:, :half], a[:, half : 2 * half], a[:, 2 * half :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], 1)


def gates(w, x, k):
    """Exact top-k softmax gates `[E,T]`."""
    p = softmax((w["router"] @ x).T).T
    order = np.argsort(-p, axis=0, kind="stable")
    chosen = np.zeros_like(p)
    np.put_along_axis(chosen, order[:k], 1, axis=0)
    return p * chosen / (p * chosen).sum(0)


def expert(w, index, x):
    return w["down"][index] @ np.tanh(w["up"][index] @ x)


def make_manifest(
    windows,
    *,
    context=40,
    prefill=8,
    state="mlstate",
    layout="bc1s",
    parts=2,
    routing="masked",
    group=1,
    buckets=(1, 4),
    shared=False,
):
    width = -(-context // 32) * 32
    lanes = [("decode", 1), *([("prefill", prefill)] if prefill else [])]
    sparse = routing == "sparse"

    def entries(ports, layer=None, experts=()):
        return tuple(
            ShardFunction(name, tokens, ports(tokens).at((layer,), None, layout), experts)
            for name, tokens in lanes
        )

    shards = []
    for layer, window in enumerate(windows):
        functions = entries(
            lambda tokens, window=window: attention_ports(tokens, width, window, state, sparse),
            layer,
        )
        shards.append(Shard(f"attn/layer_{layer:02d}.mlpackage", "attn", layer, functions, "attn"))
        held = np.array_split(np.arange(EXPERTS), parts)
        for part in range(parts):
            path = f"{'experts' if sparse else 'moe'}/layer_{layer:02d}_part_{part}.mlpackage"
            experts = tuple(map(int, held[part]))
            own = (
                expert_functions(experts, group, buckets, shared and part == 0, layer, layout)
                if sparse
                else entries(lambda tokens, part=part: moe_ports(tokens, part), layer, experts)
            )
            shards.append(
                Shard(path, "experts" if sparse else "moe", layer, own, "ffn", part, parts)
            )
    cut = VOCAB // 2
    for part, rows in enumerate([(0, cut), (cut, VOCAB)]):
        functions = entries(lambda tokens, rows=rows: head_ports(tokens, rows))
        shards.append(
            Shard(f"lm_head/part_{part}.mlpackage", "lm_head", None, functions, "head", part, 2)
        )
    return Manifest(
        "numpy",
        D,
        VOCAB,
        tuple(range(len(windows))),
        len(windows),
        context,
        width,
        routing,
        state,
        layout,
        prefill,
        "fp16",
        False,
        "embed.bin",
        {"main": {"inv_freq": INV_FREQ, "attention_factor": 1.0}},
        tuple(shards),
    )


def stream(name, tokens, how="set"):
    return Port(name, (1, D, 1, tokens), STREAM, how)


def attention_ports(tokens, width, window, state, routed):
    row, half = (1, 1, tokens, width), (1, 1, len(INV_FREQ), tokens)
    inputs = (
        stream("x", tokens),
        Port("cos", half, "rope.main.cos"),
        Port("sin", half, "rope.main.sin"),
        Port("mask", row, f"mask.{window or 'all'}"),
        Port("write", row, "write"),
        Port("keep", (1, 1, 1, width), "keep"),
    )
    outputs = (stream("y", tokens),)
    if routed:
        outputs += (
            Port("ffn_input", (1, D, 1, tokens), FFN_INPUT),
            Port("gates", (1, EXPERTS, 1, tokens), "gates.{0}"),
        )
    caches = tuple(
        Port(name, (1, HEADS, DIM, width), f"state.{{0}}.{name}") for name in ("k_cache", "v_cache")
    )
    if state == "mlstate":
        return Ports(inputs, outputs, caches)
    return Ports(
        inputs + caches, outputs + tuple(replace(port, name=f"{port.name}_out") for port in caches)
    )


def moe_ports(tokens, part):
    gates = Port("gates", (1, EXPERTS, 1, tokens), "gates.{0}")
    return Ports((stream("x", tokens),), (stream("y", tokens, "add" if part else "set"), gates))


def head_ports(tokens, rows):
    logits = Port("logits", (1, rows[1] - rows[0], 1, tokens), f"logits[{rows[0]}:{rows[1]}]")
    return Ports((stream("x", tokens),), (logits,))


def expert_functions(held, group, buckets, shared, layer=0, layout="bc1s"):
    names = {
        f"expert_{held[start]:03d}": tuple(held[start : start + group])
        for start in range(0, len(held), group)
    }
    names |= {"shared": ()} if shared else {}
    return tuple(
        expert_function(f"{name}_t{bucket}", bucket, experts, layer, layout)
        for name, experts in names.items()
        for bucket in buckets
    )


def expert_function(name, tokens, experts=(), layer=0, layout="bc1s"):
    return ShardFunction(
        name, tokens, expert_ports(tokens, len(experts)).at((layer,), None, layout), experts
    )


def expert_ports(tokens, size):
    inputs = (Port("ffn_input", (1, D, 1, tokens), FFN_INPUT),)
    if size:
        inputs += (Port("gate" if size == 1 else "gates", (1, size, 1, tokens), "gates.{0}"),)
    return Ports(inputs, (stream("y", tokens, "add"),))


def make_cache(decoder, manifest, limit_bytes=None, lacking=()):
    """A cache of numpy expert functions of one kilobyte per expert; `shared` halves what goes in.
    Loads are listed in its `loads`; functions in `lacking` cannot be loaded."""
    groups = {
        key: (layer, group)
        for layer, table in expert_layers(manifest).items()
        for group in (*table.groups, *([table.shared] if table.shared else []))
        for key in map(group.key, group.functions)
    }
    loads = []

    def load(key):
        layer, group = groups[key]
        loads.append(key.name)
        if key.name in lacking:
            raise UserError("no such function", key.name)
        size, bucket = len(group.experts), int(key.name.split("_t")[1])

        def call(inputs, state):
            x = inputs["ffn_input"].astype(np.float64).reshape(D, -1)
            if not size:
                y = x / 2
            else:
                g = inputs["gate" if size == 1 else "gates"].astype(np.float64).reshape(size, -1)
                y = sum(
                    expert(decoder.layers[layer], e, x) * g[i] for i, e in enumerate(group.experts)
                )
            y = y.astype(np.float16)
            return {"y": y[None, :, :, None] if manifest.layout == "bct1" else y[None, :, None, :]}

        return NumpyFunction(call, shapes_of(group.functions[bucket].ports.inputs))

    cache = ExpertCache(load, lambda key: 1000 * max(1, len(groups[key][1].experts)), limit_bytes)
    cache.loads = loads
    return cache


def make_shards(decoder, manifest, **cache_options):
    """LoadedShards whose functions compute `decoder` in fp64 between fp16 inputs and outputs."""

    def shape(array):  # [C,T] -> the manifest's layout
        array = array.astype(np.float16)
        return array[None, :, :, None] if manifest.layout == "bct1" else array[None, :, None, :]

    def columns(array):
        return array.astype(np.float64).reshape(array.shape[1], -1)

    def attention(w):
        def call(inputs, state):
            caches = (
                state
                if manifest.state == "mlstate"
                else {n: inputs[n].copy() for n in ("k_cache", "v_cache")}
            )
            x = columns(inputs["x"])
            cos, sin = (inputs[n][0, 0].astype(np.float64) for n in ("cos", "sin"))
            q, k, v = ((w[n] @ norm(x)).reshape(HEADS, DIM, -1) for n in "qkv")
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            for name, new in (("k_cache", k), ("v_cache", v)):
                caches[name][:] = (
                    caches[name] * inputs["keep"] + (new @ inputs["write"][0, 0])[None]
                )
            k, v = (caches[n][0].astype(np.float64) for n in ("k_cache", "v_cache"))
            scores = np.einsum("hct,hcs->hts", q, k) + inputs["mask"][0]
            out = {
                "y": shape(
                    x
                    + w["o"]
                    @ np.einsum("hts,hcs->hct", softmax(scores), v).reshape(HEADS * DIM, -1)
                )
            }
            if manifest.routing == "sparse":
                h = norm(columns(out["y"]))
                out |= {"ffn_input": shape(h), "gates": shape(gates(w, h, decoder.k))}
            if manifest.state == "explicit":
                out |= {f"{n}_out": a for n, a in caches.items()}
            return out

        return call

    def moe(w, shard):
        def call(inputs, state):
            x = columns(inputs["x"])
            g = gates(w, norm(x), decoder.k)
            y = sum(expert(w, e, norm(x)) * g[e] for e in shard.experts) + (
                x if shard.part == 0 else 0
            )
            return {"y": shape(y), "gates": shape(g)}

        return call

    def head(shard):
        return lambda inputs, state: {
            "logits": shape(decoder.head[slice(*shard.rows)] @ norm(columns(inputs["x"])))
        }

    def loaded(shard):
        if shard.kind == "attn":
            call = attention(decoder.layers[shard.layer])
        else:
            call = moe(decoder.layers[shard.layer], shard) if shard.kind == "moe" else head(shard)
        return LoadedShard(
            shard,
            {
                f.name: NumpyFunction(call, shapes_of(f.ports.inputs), shapes_of(f.ports.states))
                for f in shard.functions
            },
        )

    experts = expert_layers(manifest)
    steps = [
        experts[step] if isinstance(step, int) else loaded(step) for step in call_order(manifest)
    ]
    return LoadedShards(
        Path("."),
        manifest,
        "numpy",
        tuple(steps),
        decoder.embed,
        rope_tables(manifest),
        make_cache(decoder, manifest, **cache_options) if experts else None,
    )
