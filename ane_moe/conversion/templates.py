"""The templates of a conversion: out of the user's cache, or traced by this process."""

from collections.abc import Collection, Iterator

from ane_moe.emit.coreml.template import Template
from ane_moe.emit.coreml.template_cache import TemplateCache
from ane_moe.model.template_key import TemplateKey


def templates_of(
    keys: Collection[TemplateKey], cache: TemplateCache
) -> Iterator[tuple[TemplateKey, Template]]:
    """Each template as soon as it is there: those of the cache first, then, since others begin to
    write what they have, those that are traced fastest."""
    missing = []
    for key in keys:
        if found := cache.find(key):
            yield key, found
        else:
            missing.append(key)
    for key in sorted(missing, key=lambda key: sum(1 for _ in key.block.rows())):
        from ane_moe.emit.coreml.tracing import make_template  # torch and coremltools: seconds

        made = make_template(key)
        cache.keep(key, made)
        yield key, made
