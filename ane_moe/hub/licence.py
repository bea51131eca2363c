"""The licence of the model that a conversion was made from."""

from collections.abc import Mapping


def licence_of(origin: Mapping[str, str]) -> str | None:
    """What the card of the base model on the Hub says, by the manifest's `origin`; None where it
    says nothing, or cannot be asked."""
    import huggingface_hub as hub

    if not origin.get("hub"):
        return None
    try:
        found = hub.HfApi().model_info(origin["hub"], revision=origin.get("revision"))
    except Exception:  # of many libraries: no network, a repository that is gone
        return None
    stated = getattr(found.card_data, "license", None)
    return stated if isinstance(stated, str) else None
