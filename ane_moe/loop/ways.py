"""The ways to take tokens: one after the other with guesses of their experts, drafts that are
checked, experts that are pinned, several samples of each."""

from ane_moe.early_adapters import Adapters
from ane_moe.loop.pinning import PinnedSession, PinOptions
from ane_moe.loop.prefetch import Guessing
from ane_moe.loop.roster import RosterOptions, RosterSession
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.speculation import SpeculationOptions, SpeculativeSession

Way = Guessing | SpeculationOptions | PinOptions | RosterOptions


def open_session(
    shards: LoadedShards, way: Way, adapters: Adapters | None = None, *, concurrency: int = 1
) -> Session:
    """A session that takes tokens in this way; drafts are by the `adapters`, where there are some.
    Raises UserError where the conversion does not allow it."""
    match way:
        case Guessing():
            return Session(shards, concurrency=concurrency, predictor=way)
        case SpeculationOptions():
            return SpeculativeSession(shards, way, adapters, concurrency=concurrency)
        case PinOptions():
            return PinnedSession(shards, way, concurrency=concurrency)
        case RosterOptions():
            return RosterSession(shards, way, concurrency=concurrency)
