"""What `ane-moe doctor` found, in lines of text."""

from collections.abc import Iterator

from ane_moe.installation import Installation, Package

GB = 1e9


def installation_lines(found: Installation) -> Iterator[str]:
    """Versions, machine, what is measured here, and the verdict last."""
    yield f"ane-moe {found.version}, Python {found.python}, {found.system}"
    yield ""
    rows = [(_name(one), one.found or "none", _state(one)) for one in found.packages]
    yield from _aligned(rows)
    yield f"compiled libraries of coremltools: {', '.join(found.native) or 'none'}"
    yield ""
    chip = f"{found.machine.chip}, macOS {found.machine.os}" if found.core_ml else ""
    yield f"Core ML: {chip or 'not here; packages are executed by the reference runtime'}"
    yield f"cores: {found.usable_cores} of {found.cores} usable"
    free, total = found.free_memory_bytes / GB, found.memory_bytes / GB
    yield f"memory: {free:.1f} GB free of {total:.1f} GB"
    for disk in found.disks:
        yield f"disk: {disk.free_bytes / GB:.1f} GB free for {disk.purpose} ({disk.folder})"
    kept = found.fetched
    yield (
        f"fetched of addresses and of the Hub: {kept.count} folders, {kept.size_bytes / GB:.1f} GB "
        f"({kept.folder}); `ane-moe cache` lists and removes them"
    )
    yield ""
    yield from _aligned([(one.what, one.command, one.how) for one in found.findings])
    yield ""
    if found.sound:
        yield "All that is needed is here. next: ane-moe plan CHECKPOINT, or `ane-moe` alone"
    else:
        yield "FAILED: packages are missing, or of another version than needed: pip install ane-moe"


def _name(package: Package) -> str:
    return f"{package.name} [{package.extra}]" if package.extra else package.name


def _state(package: Package) -> str:
    if package.fits:
        return "ok"
    if package.found:
        return f"{package.wanted} is wanted"
    return f"pip install 'ane-moe[{package.extra}]'" if package.extra else "is needed"


def _aligned(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for one, two, three in rows:
        yield f"{one:{first}}  {two:{second}}  {three}"
