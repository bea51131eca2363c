"""MiniMax-Text-01: lightning attention with attention between, few and wide experts; each half of a
layer adds to what its norm gives."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import FULL, gqa, layer_kinds, llama, mlp, router
from ane_moe.families.keys import LAYER, Framed, KeyTable, Runs
from ane_moe.families.kimi_linear import LINEAR
from ane_moe.families.mixtral import KEYS as MIXTRAL
from ane_moe.families.taps import Taps
from ane_moe.model.lightning import LightningSpec
from ane_moe.model.spec import LayerSpec, MixerSpec, ModelSpec, MoeSpec

NET, HEAD = f"{LAYER}.self_attn", ("query_rows", "key_rows", "value_rows")

KEYS: KeyTable = {
    **MIXTRAL,
    **{
        f"layers.{{layer}}.attn.{part.removesuffix('_rows')}.weight": (
            Runs(f"{NET}.qkv_proj.weight", HEAD, part),
        )
        for part in HEAD
    },
    "layers.{layer}.attn.gate.weight": (f"{NET}.output_gate.weight",),
    "layers.{layer}.attn.slope.weight": (Framed(f"{NET}.slope_rate", before=0, after=2),),
    "layers.{layer}.attn.mixed_norm.weight": (f"{NET}.norm.weight",),
    "layers.{layer}.attn.o.weight": (f"{NET}.o_proj.weight", f"{NET}.out_proj.weight"),
}
TAPS = Taps(added_factor="mlp_beta_factor")
NORM_EPS = 1e-6  # of the norm inside lightning attention, which no file says


def spec(config: Config) -> ModelSpec:
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = gqa(config, window=window)
    if attention.head_dim % 32:  # the last axis of a state (coremltools issue 2631)
        raise config.wrong("head_dim", "a multiple of 32")
    mixers: dict[str, MixerSpec] = {
        FULL: attention,
        LINEAR: LightningSpec(attention.heads, attention.head_dim, NORM_EPS),
    }
    config.only("rotary_dim", None, attention.head_dim)  # transformers does not look at it
    moe = MoeSpec(router(config, renorm=True), mlp(config, "intermediate_size"))
    kept, added = (
        {kind: _factors(config, kind, of) for kind in mixers} for of in ("alpha", "beta")
    )
    layers = [
        LayerSpec(mixers[kind], moe, keeps=kept[kind], adds=added[kind])
        for kind in layer_kinds(config, known=(FULL, LINEAR))
    ]
    return llama(config, layers)


def _factors(config: Config, kind: str, name: str) -> tuple[float, float]:
    """Of a mixer, and of experts."""
    mixer = "full_attn" if kind == FULL else "linear_attn"
    return config.number(f"{mixer}_{name}_factor"), config.number(f"mlp_{name}_factor")
