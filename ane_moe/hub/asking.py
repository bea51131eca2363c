"""What the Hub answers when something is wrong, as one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from ane_moe.addresses import is_on_hub, reason_of
from ane_moe.checkpoints.hub import HubName, hub_name
from ane_moe.errors import UserError


@contextmanager
def asking(what: str, do: str) -> Iterator[None]:
    """Whatever the libraries of the Hub raise inside becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many libraries: no network, no such repository, no permission
        raise UserError(what, reason_of(error), do) from None


def repository(text: str) -> HubName:
    """The repository that is named: OWNER/NAME[@REVISION], with hf:// or not. Raises UserError."""
    name = hub_name(text if is_on_hub(text) else f"hf://{text}")
    if name is None or name.kind:
        raise UserError("no repository of the Hub has this name", text, "give OWNER/NAME")
    return name
