"""Where a layer of Hugging Face's model has what a golden keeps."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Taps:
    """Modules and parameters of a decoder layer, by their paths in it.

    `ffn_norm` is the norm before the feed-forward block: what enters it is the stream after the
    mixer. The router is the module whose class's name ends with `router`; its outputs begin with
    logits (scores, with no `score`), weights and choices. `score`, and the bias called
    `choice_bias` (of the router or of the block it is in), make of logits what choices are made by;
    `by_logits` the bias alone does. `groups`: what the router calls the number of groups of
    experts, and that of groups chosen from, by the sum of the `group_best` largest scores of each;
    a number that is null stands for 1. `shared` is an always-on expert that stands beside the
    experts' block. `skip`: a choice of weight 0 is of the class after the last expert. `carry` is
    the name of what a layer hands on beside the stream; with `hands_on` it is something that no
    part here reads. `residuals` are the modules of an affine residual, after the mixer and after
    the feed-forward block, with the names of what multiplies the added, and of what shifts and
    multiplies the stream. `entry`: the model shifts the embedding before the first layer (a
    multiplier alone goes into the table). `alone`: a layer is one block, and where the name of a
    class in it ends with one of these, a mixer. `beside` is the mixer where the feed-forward block
    reads what it reads, and both add to that. `head` is the model's module that gives scores.
    `after` is the norm of what the feed-forward block adds, where there is one; `layer_scale` the
    number that multiplies the stream after the layer, `beside_norm` the norm before an MLP next to
    the experts. `added_factor`: both blocks add to what their norms give, and the layer has a
    number of this name that multiplies what the feed-forward block adds. `values`, `up` and `down`
    are what the projections to an attention's values, and those around a gated MLP's product, end
    in (nothing where its activation is not linear in `up`); `gate_up` gives both factors, the gate
    first. `inside` is the part of the configuration that is of the model which reads and writes
    text. `layers` is what the decoder calls its layers. Routers whose outputs have nothing but
    logits `logits`-th in them choose the `top_k` largest. `nth` are the layer's numbers for which
    addition to the stream each of its blocks is, where these are weighed. With `sorted_inputs`
    experts are called with tokens alone, as many for each expert, times its gate. `sorted_block` is
    one that routes and computes experts, on tokens in the order of these. A layer may be
    several of ours: `pieces` says of each of these where its modules are, by the names they have
    elsewhere, the first norm first. What the experts' block of the first gives, the last adds.
    Where experts work on a latent, `latent` is the projection that gives it.
    """

    ffn_norm: str = "post_attention_layernorm"
    score: str = "softmax"
    choice_bias: str = ""
    by_logits: bool = False
    router: str = "Router"
    groups: tuple[str, str] | None = None
    group_best: int = 2
    shared: str = ""
    skip: bool = False
    carry: str = ""
    hands_on: bool = False
    entry: bool = False
    beside: str = ""
    residuals: tuple[str, str] | None = None
    added_scale: str = "hidden_states_scale"
    stream_bias: str = "residual_bias"
    stream_scale: str = "residual_scale"
    alone: tuple[str, ...] = ()
    head: str = "lm_head"
    inside: str = ""
    after: str = ""
    layer_scale: str = ""
    beside_norm: str = ""
    layers: str = "layers"
    logits: int | None = None
    sorted_inputs: bool = False
    sorted_block: str = ""
    added_factor: str = ""
    nth: tuple[str, str] | None = None
    values: str = "v_proj"
    up: str = "up_proj"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    pieces: tuple[Mapping[str, str], ...] = ()
    latent: str = ""

    @property
    def each(self) -> int:
        """How many layers of ours a layer is."""
        return len(self.pieces) or 1


# The router of DeepSeek-V3, in many families.
DEEPSEEK = Taps(
    score="sigmoid", choice_bias="e_score_correction_bias", groups=("num_group", "topk_group")
)
