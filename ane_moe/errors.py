"""The one exception type that reaches users."""


class UserError(Exception):
    """Something the user can mend: what is wrong, what was found, what to do.

    The command line prints it as one line on stderr and exits with 2.
    """

    def __init__(self, what: str, found: str = "", do: str = ""):
        self.what = what
        self.found = found
        self.do = do
        parts = [what] + ([f"found: {found}"] if found else []) + ([do] if do else [])
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


class DiskFull(UserError):
    """There is no room to write, or no more is allowed: on another machine there may be."""
