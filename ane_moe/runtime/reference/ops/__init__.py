"""The op table: every op the reference runtime executes."""

from ane_moe.runtime.reference.ops import (
    activation,
    constexpr,
    conv,
    detection,
    elementwise,
    indexing,
    linear,
    lists,
    movement,
    normalization,
    pooling,
    quantization,
    random,
    recurrent,
    reduction,
    resizing,
    sampling,
    scatter,
    slicing,
    sorting,
)
from ane_moe.runtime.reference.ops.table import Op, OpTable

OPS: tuple[Op, ...] = (
    *activation.OPS,
    *constexpr.OPS,
    *conv.OPS,
    *detection.OPS,
    *elementwise.OPS,
    *indexing.OPS,
    *linear.OPS,
    *lists.OPS,
    *movement.OPS,
    *normalization.OPS,
    *pooling.OPS,
    *quantization.OPS,
    *random.OPS,
    *recurrent.OPS,
    *reduction.OPS,
    *resizing.OPS,
    *sampling.OPS,
    *scatter.OPS,
    *slicing.OPS,
    *sorting.OPS,
)

TABLE = OpTable(OPS)

# Ops that are part of the executor itself, because they deal with names, blocks or states and not
# with tensors alone.
STRUCTURAL = {
    "const": "",
    "cond": "only the block that is taken runs",
    "while_loop": "",
    "classify": "gives the label as str or int and the probabilities by label; "
    "of equal labels the last one's is kept",
    "read_state": "since iOS18",
    "write_state": (
        "since iOS18; saved packages hold it where the converter says coreml_update_state"
    ),
}
