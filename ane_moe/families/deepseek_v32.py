"""DeepSeek-V3.2 (DeepSeek-V3.2-Exp): DeepSeek-V3's layer. Attention goes to the tokens that an
indexer scores highest, which are all of a context of no more than it chooses."""

from ane_moe.families.config import Config
from ane_moe.families.decoder import listed_dense, sigmoid_router
from ane_moe.families.deepseek_v3 import ATTENTION, experts, latent_model
from ane_moe.families.deepseek_v3 import KEYS as DEEPSEEK_V3
from ane_moe.families.deepseek_v3 import TAPS as TAPS
from ane_moe.families.keys import KeyTable, Paired
from ane_moe.model.indexer import IndexerSpec
from ane_moe.model.spec import ModelSpec

INDEXERS = "indexers, which choose all tokens of a context this short"
BESIDE = {INDEXERS: r"^model\.layers\.\d+\.self_attn\.indexer\."}
NAMES = {
    "q.weight": "wq_b.weight",
    "k.weight": "wk.weight",
    "k_norm.weight": "k_norm.weight",
    "k_norm.bias": "k_norm.bias",
    "by_head.weight": "weights_proj.weight",
}
INDEX_KEYS: KeyTable = {
    f"layers.{{layer}}.attn.index.{ours}": (f"{ATTENTION}.indexer.{theirs}",)
    for ours, theirs in NAMES.items()
}
# Of indexers that are rotated in pairs of neighbours.
PAIRED_INDEX_KEYS: KeyTable = {
    **INDEX_KEYS,
    **{
        f"layers.{{layer}}.attn.index.{ours}": (Paired(f"{ATTENTION}.indexer.{theirs}", "paired"),)
        for ours, theirs in NAMES.items()
        if ours != "by_head.weight"
    },
}
KEYS: KeyTable = {**DEEPSEEK_V3, **INDEX_KEYS}


def spec(config: Config) -> ModelSpec:
    return indexed_model(config, indexer(config))


def indexed_model(config: Config, chooses: IndexerSpec | None) -> ModelSpec:
    """The model whose attention goes to what an indexer chooses, or to all tokens."""
    config.only("rope_interleave", None, True)  # DeepseekV32Attention has no other
    config.only("moe_layer_freq", None, 1)
    config.integer("q_lora_rank")

    def kind(number: int) -> str:
        first = config.integer("first_k_dense_replace", at_least=0)
        return "dense" if number < first else "sparse"

    ffns = listed_dense(config, experts(config, sigmoid_router(config)), kind)
    return latent_model(config, ffns, indexer=chooses)


def indexer(config: Config, **facts: bool) -> IndexerSpec:
    """The indexer from the usual fields; its queries are made of the latents of queries."""
    config.integer("q_lora_rank")
    heads, width = config.integer("index_n_heads"), config.integer("index_head_dim")
    if width % 2 or width < config.integer("qk_rope_head_dim"):
        raise config.wrong("index_head_dim", "even, and no less than qk_rope_head_dim")
    return IndexerSpec(heads, width, config.integer("index_topk"), **facts)


def within(config: Config, chosen: int) -> Config:
    """With a context of no more tokens than are `chosen` for attention.

    Source: transformers' `DeepseekV32Indexer`, which takes the best min(index_topk, tokens)."""
    context = min(chosen, config.integer("max_position_embeddings"))
    return Config(config.values | {"max_position_embeddings": context}, config.where)
