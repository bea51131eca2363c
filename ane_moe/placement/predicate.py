"""The conditions of rules: comparisons over named facts, written as a small subset of Python's
expressions.

`and`, `or`, `not`, comparisons, `in`, `+ - * / %`, numbers, strings, tuples, names, and `name[-1]`.
A comparison with a fact that is unknown (None) is false.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Facts = Mapping[str, Any]
Term = Callable[[Facts], Any]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}


def compile_condition(text: str) -> Callable[[Facts], bool]:
    """A function of the facts. Raises ValueError for anything outside the subset."""
    term = _term(_parse(text))
    return lambda facts: bool(term(facts))


def compile_term(text: str) -> Term:
    """The value of an expression over the facts, None where one of them is unknown. Raises
    ValueError for anything outside the subset."""
    return _term(_parse(text))


def names_in(text: str) -> Iterator[str]:
    """The facts a condition speaks of."""
    return (node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name))


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not a condition: {text!r}: {error.msg}") from None


def _term(node: ast.expr) -> Term:
    if isinstance(node, ast.BoolOp):
        parts = [_term(value) for value in node.values]
        every = isinstance(node.op, ast.And)
        return lambda facts: (all if every else any)(bool(part(facts)) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _term(node.operand)
        return lambda facts: not inner(facts)
    if isinstance(node, ast.Compare):
        return _comparison(node)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right, combine = _term(node.left), _term(node.right), _ARITHMETIC[type(node.op)]
        return lambda facts: _known(combine, left(facts), right(facts))
    if isinstance(node, ast.Subscript):
        return _item(node)
    if isinstance(node, ast.Name):
        name = node.id
        return lambda facts: facts.get(name)
    return _literal(node)


def _literal(node: ast.expr) -> Term:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"conditions have no {type(node).__name__}: {ast.unparse(node)!r}"
        ) from None
    return lambda facts: value


def _comparison(node: ast.Compare) -> Term:
    if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
        raise ValueError(f"not a simple comparison: {ast.unparse(node)!r}")
    left, right, compare = _term(node.left), _term(node.comparators[0]), _COMPARE[type(node.ops[0])]
    return lambda facts: bool(_known(compare, left(facts), right(facts)))


def _item(node: ast.Subscript) -> Term:
    whole, index = _term(node.value), ast.literal_eval(node.slice)

    def item(facts: Facts) -> Any:
        values = whole(facts)
        inside = isinstance(values, tuple) and -len(values) <= index < len(values)
        return values[index] if inside else None

    return item


def _known(combine: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    return None if left is None or right is None else combine(left, right)
