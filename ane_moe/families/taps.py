"""Where a layer of Hugging Face's model has what a golden keeps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Taps:
    """Modules and parameters of a decoder layer, by their paths in it.

    `ffn_norm` is the norm before the feed-forward block: what enters it is the stream after the
    mixer. The router is the module whose class is called so; its outputs begin with logits, weights
    and choices. `score`, and the bias called `choice_bias` (of the router or of the block it is
    in), make of logits what choices are made by. `skip`: a choice of weight 0 is of the class after
    the last expert. `carry` is the name of what a layer hands on beside the stream. `residuals` are
    the modules of an affine residual, after the mixer and after the feed-forward block, with the
    names of what multiplies the added, and of what shifts and multiplies the stream. `entry`: the
    model shifts the embedding before the first layer (a multiplier alone goes into the table).
    `head` is the model's module that gives scores. What experts give is multiplied by the number
    that their block calls `experts_scale`.
    """

    ffn_norm: str = "post_attention_layernorm"
    score: str = "softmax"
    choice_bias: str = ""
    skip: bool = False
    carry: str = ""
    entry: bool = False
    residuals: tuple[str, str] | None = None
    added_scale: str = "hidden_states_scale"
    stream_bias: str = "residual_bias"
    stream_scale: str = "residual_scale"
    head: str = "lm_head"
    experts_scale: str = ""
