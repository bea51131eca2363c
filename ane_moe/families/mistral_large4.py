"""Mistral Large 4 (Mistral-Large-4-1T-A52B), its language model: Mistral 4's experts, latent
attention whose queries grow with the logarithm of their place, each head's in its own way, and
factors of rotation that were learned.

Attention goes to the tokens that an indexer scores highest, which are all of a context of no more
than it chooses: that is the limit.
"""

from dataclasses import replace

import numpy as np

from ane_moe.checkpoints.checkpoint import Checkpoint
from ane_moe.errors import UserError
from ane_moe.families.config import Config
from ane_moe.families.decoder import (
    ROPE,
    decoder,
    listed_dense,
    n_layers,
    sigmoid_router,
    text_config,
)
from ane_moe.families.deepseek_v3 import ATTENTION, QUERY, experts, rotated_latent_attention
from ane_moe.families.deepseek_v32 import INDEXERS, within
from ane_moe.families.keys import Entry, KeyTable, Runs, each_expert, expert_keys
from ane_moe.families.mistral4 import KEYS as MISTRAL4
from ane_moe.families.taps import Taps
from ane_moe.model.mla import MlaSpec
from ane_moe.model.spec import HeadSpec, LayerSpec, ModelSpec, RopeSpec

# What modules are called in published files, by transformers' names for them.
NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn": "attention",
    "q_proj": "wq",
    "kv_a_proj_with_mqa": "wkv_a_with_mqa",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "kv_a_layernorm": "kv_a_norm",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
    "mlp.gate.": "gate.",
    "mlp.shared_experts": "shared_experts",
    "mlp.experts": "experts",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "softmax_scaling.scale": "ssmax_scaling.s",
    "softmax_scaling.bias": "ssmax_scaling.b",
}
ALPHA = ("lerope.alpha", "model.rotary_emb.alpha", "model.language_model.rotary_emb.alpha")


def _published(entry: Entry) -> Entry:
    if not isinstance(entry, str):
        return replace(entry, key=str(_published(entry.key)))
    for theirs, own in NAMES.items():
        entry = entry.replace(theirs, own)
    return entry


WITH_QUERY_LATENTS = ("layers.{layer}.attn.q_down.", "layers.{layer}.attn.q_norm.")
THEIRS: KeyTable = {
    **{ours: own for ours, own in MISTRAL4.items() if not ours.startswith(WITH_QUERY_LATENTS)},
    **{
        f"layers.{{layer}}.attn.q_{part}.weight": (Runs(f"{ATTENTION}.q_proj.weight", QUERY, part),)
        for part in QUERY
    },
    **expert_keys(each_expert("mlp.experts", "gate_proj", "up_proj", "down_proj")),
    **{
        f"layers.{{layer}}.attn.growth.{name}": (f"{ATTENTION}.softmax_scaling.{name}",)
        for name in ("scale", "bias")
    },
}
FUSED = {ours: own for ours, own in MISTRAL4.items() if ".experts." in ours}
KEYS: KeyTable = {
    ours: (*map(_published, entries), *(FUSED.get(ours, entries)))
    for ours, entries in THEIRS.items()
}
TAPS = Taps(groups=("num_group", "topk_group"), hands_on=True)
BESIDE = {
    INDEXERS: r"^(model\.)?layers\.\d+\.(attention|self_attn)\.indexer\.",
    "factors of rotation, which are in its tables": r"(^lerope|\.rotary_emb)\.alpha$",
    "what joins patches of images": r"^(patch_merger|pre_mm_projector_norm"
    r"|vision_language_adapter)\.",
    "what predicts further tokens": r"^mtp_dspark\.",
}


def spec(config: Config) -> ModelSpec:
    config = text_config(config).renamed({}, norm_topk_prob=True)
    config.only("norm_topk_prob", True)  # MistralLarge4TextTopkRouter has no other
    count = n_layers(config)
    config.only("kv_source_layers", None, list(range(count)))
    turned = config.integers("no_rope_layers")
    if len(turned) < count:
        raise config.wrong("no_rope_layers", f"a number for each of {count} layers")
    rotated, ropes = _attention(config)
    plain = replace(rotated, nope=rotated.nope + rotated.rotated, rotated=0, rope=None)
    router = replace(sigmoid_router(config), score="softmax", bias=False)
    ffns = listed_dense(config, experts(config, router))
    mixers = [rotated if turns else plain for turns in turned[:count]]
    layers = [LayerSpec(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)]
    head = HeadSpec(
        config.flag("tie_word_embeddings"), softcap=config.number("final_logit_softcapping")
    )
    limited = within(config, config.integer("index_topk"))
    return decoder(limited, layers, ropes=ropes, head=head)


def _attention(config: Config) -> tuple[MlaSpec, dict[str, RopeSpec]]:
    direct = Config(config.values | {"q_lora_rank": None}, config.where)
    eps = config.number("rms_norm_eps")
    mixer, ropes = rotated_latent_attention(direct, grows=True, latent_eps=eps)
    config.only("head_dim", None, mixer.rotated)
    return mixer, ropes


def as_read(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """With the frequencies times the exponents of what the checkpoint has for them."""
    names = [name for name in ALPHA if name in checkpoint.tensors]
    rope = spec.ropes[ROPE]
    if not names or checkpoint.tensors[names[0]].shape != (len(rope.inv_freq),):
        found = ", ".join(str(checkpoint.tensors[name].shape) for name in names) or "none"
        what = f"{checkpoint.folder} lacks {ALPHA[0]}, [{len(rope.inv_freq)}]"
        raise UserError(what, found, "download the checkpoint again")
    learned = np.array(rope.inv_freq, np.float32) * np.exp(checkpoint.made(names[0]))
    own = replace(rope, inv_freq=tuple(map(float, learned)))
    return replace(spec, ropes=spec.ropes | {ROPE: own})
