"""The error of one operation."""

from ane_moe.errors import UserError


class OpError(UserError):
    """A UserError that names the operation it is of, and the function."""

    def __init__(self, op: str, name: str, where: str, error: UserError):
        super().__init__(f"op {op} '{name}' in {where}: {error.what}", error.found, error.do)
