"""Mixtures of experts that transformers has and no family describes: what is nearest, and what that
lacks."""

INDEXED = "deepseek_v32"
# model_type -> (the supported one that is nearest, or nothing; what it has not got).
MISSING: dict[str, tuple[str, str]] = {
    "deepseek_v4": (INDEXED, "compressed attention, experts chosen by token, hyper-connections"),
    "diffusion_gemma": ("", "Gemma 4's layer, decoding by diffusion"),
    "glm5_next": (INDEXED, "linear attention, hyper-connections"),
    "hy_v4": (INDEXED, "sinks over latents, hyper-connections"),
    "inkling": ("", "convolutions around attention, routing together with shared experts"),
    "inkling2": ("", "convolutions around attention, a softly capped activation"),
    "muse_spark": (
        "afmoe",
        "norms of a latent and after each expert, gated residuals, a normed embedding",
    ),
    "qwen4_exp": ("qwen3_next", "tables of n-grams, sparse attention by an index"),
}
# What has experts, and is no decoder that routes tokens.
ELSEWHERE = {
    "doge": "experts are rows of embeddings, found by product keys",
    "nllb_moe": "encoder and decoder; experts of limited capacity drop tokens",
    "switch_transformers": "encoder and decoder; experts of limited capacity drop tokens",
    "vitpose_backbone": "images; experts are chosen by data set",
}


def nearest(model_type: str) -> str:
    """What is known of an unsupported type, as a sentence; nothing for a type that is not."""
    if model_type in ELSEWHERE:
        return f"it is no decoder that routes tokens ({ELSEWHERE[model_type]})"
    if model_type not in MISSING:
        return ""
    like, lacks = MISSING[model_type]
    return f"nearest is {like}, which lacks {lacks}" if like else f"missing: {lacks}"
