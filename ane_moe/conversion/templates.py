"""The templates of a conversion: out of the user's cache, or made by this process."""

from collections.abc import Collection, Iterator

from ane_moe.emit.coreml.template import Template
from ane_moe.emit.coreml.template_cache import CORE_ML, Making, TemplateCache
from ane_moe.model.template_key import TemplateKey
from ane_moe.runtime.coreai.installed import DISTRIBUTIONS

CORE_AI = Making(
    (*CORE_ML.tools, *DISTRIBUTIONS),
    (*CORE_ML.sources, "emit/coreai", "mlprogram", "runtime/coreai"),
)


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


def asset_templates_of(
    keys: Collection[TemplateKey], cache: TemplateCache, assets: TemplateCache
) -> Iterator[tuple[TemplateKey, Template]]:
    """The same for Core AI: those of the cache `assets` first, then those that are made from
    templates for Core ML."""
    missing = []
    for key in keys:
        if found := assets.find(key):
            yield key, found
        else:
            missing.append(key)
    for key, template in templates_of(missing, cache):
        from ane_moe.emit.coreai.tracing import make_asset_template  # torch, and Apple's packages

        made = make_asset_template(template)
        assets.keep(key, made)
        yield key, made
