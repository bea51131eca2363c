"""The token count of a converted program, set afterwards: coremltools converts a block once, not
once per function.

The block is converted for MARKER tokens, a prime larger than any size of its own. Then a multiple
of it in the program, or a few more or less (a convolution sees tokens before the call), is a size
that grows with the tokens, and the program for n tokens has n in its place.
"""

from collections.abc import Iterator

from google.protobuf.message import Message

from ane_moe.mlprogram.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2

MARKER = 1_000_003
MAX_MORE = 64  # tokens more, or less, than a multiple
TO_THE_END = 2**31 - 1  # what coremltools writes for an open end of a slice
# The integers of a program: field by type of message.
INTEGERS = {
    MIL_pb2.Dimension.ConstantDimension.DESCRIPTOR: "size",
    MIL_pb2.TensorValue.RepeatedInts.DESCRIPTOR: "values",
    FeatureTypes_pb2.ArrayFeatureType.DESCRIPTOR: "shape",
}


def with_token_count(model: Model_pb2.Model, tokens: int) -> Model_pb2.Model:
    """A copy for `tokens` tokens of a program for MARKER of them.

    Raises ValueError for an integer that depends on the token count in another way.
    """
    made = Model_pb2.Model()
    made.CopyFrom(model)
    for message in _messages(made):
        field = INTEGERS.get(message.DESCRIPTOR)
        if field == "size":
            message.size = _scaled(message.size, tokens)
        elif field is not None:
            values = getattr(message, field)
            values[:] = [_scaled(value, tokens) for value in values]
    return made


def _scaled(value: int, tokens: int) -> int:
    if abs(value) < MARKER - MAX_MORE or value == TO_THE_END:
        return value
    times, shifted = divmod(value + MAX_MORE, MARKER)
    if value < 0 or shifted > 2 * MAX_MORE or value >= MARKER**2:
        raise ValueError(f"{value} is not in proportion to the token count {MARKER}")
    return times * tokens + shifted - MAX_MORE


def _messages(message: Message) -> Iterator[Message]:
    """The message and all within it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            inner = (
                value.values() if field.message_type.fields_by_name["value"].message_type else ()
            )
        else:
            inner = (value,) if isinstance(value, Message) else value
        for one in inner:
            yield from _messages(one)
