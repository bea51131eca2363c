"""What a client is told when it does not get what it asked for, in OpenAI's form."""

from dataclasses import dataclass
from typing import Any

INVALID = "invalid_request_error"
OVERLOADED = "overloaded_error"
INTERNAL = "server_error"


@dataclass(eq=False)
class Refusal(Exception):
    """`param` names the field that is wrong, `code` is for programs."""

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }
