"""The one exception type that reaches users."""

import re

from ane_moe.origins import with_origins

# A user and a password before a host, or whatever stands there in an address of the web.
USER = re.compile(
    r"(?<=//)[^/\s'\"@]*:[^/\s'\"]*@|(?<=http://)[^/\s'\"]+@|(?<=https://)[^/\s'\"]+@"
)
QUERY = re.compile(r"\?[^\s'\"<>=?]+=[^\s'\"<>]*")  # a signed one opens a file for whoever reads it


def without_secrets(text: str) -> str:
    """A text without what gives access in the addresses that it names."""
    return QUERY.sub("?...", USER.sub("...@", text))


class UserError(Exception):
    """Something the user can mend: what is wrong, what was found, what to do.

    The command line prints it as one line on stderr and exits with 2. Folders that were fetched are
    called by where they are from.
    """

    def __init__(self, what: str, found: str = "", do: str = ""):
        what, found, do = (without_secrets(with_origins(text)) for text in (what, found, do))
        self.what = what
        self.found = found
        self.do = do
        parts = [what] + ([f"found: {found}"] if found else []) + ([do] if do else [])
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


class DiskFull(UserError):
    """There is no room to write, or no more is allowed: on another machine there may be."""
