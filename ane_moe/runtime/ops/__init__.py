"""The op table: every op the reference runtime executes, and those it leaves out with the reason."""

from ane_moe.runtime.ops import (
    activation,
    constexpr,
    conv,
    elementwise,
    indexing,
    linear,
    movement,
    normalization,
    pooling,
    quantization,
    reduction,
    resizing,
    scatter,
    slicing,
    sorting,
)
from ane_moe.runtime.ops.table import Op, OpTable

OPS: tuple[Op, ...] = (
    *activation.OPS, *constexpr.OPS, *conv.OPS, *elementwise.OPS, *indexing.OPS, *linear.OPS, *movement.OPS,
    *normalization.OPS, *pooling.OPS, *quantization.OPS, *reduction.OPS, *resizing.OPS, *scatter.OPS, *slicing.OPS,
    *sorting.OPS,
)

TABLE = OpTable(OPS)

# Ops that are part of the executor itself, because they deal with names, blocks or states and not with tensors alone.
STRUCTURAL = {
    "const": "",
    "cond": "only the block that is taken runs",
    "while_loop": "",
    "read_state": "since iOS18",
    "write_state": "since iOS18; saved packages hold it where the converter says coreml_update_state",
}

LEFT_OUT = {
    "classify": "returns a dictionary; no language model needs it",
    "crop_resize": "image op",
    "affine": "image op",
    "resample": "image op",
    "non_maximum_suppression": "image op",
    "lstm": "recurrent cell",
    "gru": "recurrent cell",
    "rnn": "recurrent cell",
    "list_gather": "lists",
    "list_length": "lists",
    "list_read": "lists",
    "list_scatter": "lists",
    "list_write": "lists",
    "make_list": "lists",
    "random_bernoulli": "random",
    "random_categorical": "random",
    "random_normal": "random",
    "random_uniform": "random",
}
