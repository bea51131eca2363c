"""Bytes of files on the Hugging Face Hub, by ranges: `hf://OWNER/NAME@REVISION/FILE`. Whoever reads
gives a token of its own (`HF_TOKEN`, `hf auth login`), which no address has in it."""

from typing import Any
from urllib.parse import urlsplit

from ane_moe.addresses import AT_COMMIT, HUB, tried
from ane_moe.errors import UserError

PROTOCOL = f"{HUB}://"
DO = "check HF_TOKEN and the network of whoever reads it"


def hub_size(url: str) -> int | None:
    """Bytes of a file; None where the Hub does not say. Raises UserError where there is none."""
    import huggingface_hub as hub

    try:
        return tried(lambda: hub.get_hf_file_metadata(_place(url))).size
    except Exception as error:  # of many libraries: no network, no such file, no permission
        raise _refused(url, error) from None


def hub_range(url: str, first: int, last: int) -> bytes:
    """Bytes [first, last) of a file. Raises UserError where they cannot be had."""
    try:
        return range_at(_place(url), first, last)
    except UserError:
        raise
    except Exception as error:  # as above
        raise _refused(url, error) from None


def range_at(place: str, first: int, last: int) -> bytes:
    """Bytes [first, last) of a file of the Hub at its own address, or where that leads."""
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {**_headers(place, build_hf_headers()), "Range": f"bytes={first}-{last - 1}"}

    def get() -> bytes:
        response = get_session().get(place, headers=headers)
        response.raise_for_status()
        return bytes(response.content)

    data = tried(get)
    if len(data) != last - first:
        what = f"{place} gave {len(data)} bytes"
        raise UserError(what, f"{last - first} asked for", "try again")
    return data


def _place(url: str) -> str:
    import huggingface_hub as hub

    found = AT_COMMIT.fullmatch(url)
    assert found is not None and found["file"]
    return str(hub.hf_hub_url(found["hub"], found["file"], revision=found["revision"]))


def _headers(url: str, headers: dict[str, Any]) -> dict[str, Any]:
    """Without the user's token where the file lies elsewhere than on the Hub."""
    from huggingface_hub import constants

    if urlsplit(url)[:2] == urlsplit(constants.ENDPOINT)[:2]:  # scheme, and host with port
        return headers
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}


def _refused(url: str, error: Exception) -> UserError:
    """Of an answer only its number is told: it may name a place that a signature opens."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    found = f"the Hub answers {status}" if status else type(error).__name__
    return UserError(f"{url} cannot be read", found, DO)
