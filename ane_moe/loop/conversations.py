"""Conversations in the caches of sessions over the same shards: a prompt goes on from the one that
it has most in common with, so that only what is new of it is taken in."""

from collections.abc import Callable, Sequence

from ane_moe.errors import UserError
from ane_moe.loop.figures import Figures
from ane_moe.loop.generation import GenerateOptions, Generation, generate
from ane_moe.loop.prefetch import AUTO
from ane_moe.loop.session import Session
from ane_moe.loop.shards import LoadedShards
from ane_moe.loop.tokenizer import Begun, Decode

WORTH_KEEPING = 2  # a conversation is cut back when a prompt shares one token in so many with it


class _Kept:
    """A session, and what was generated last with it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.last: Generation | None = None

    @property
    def ids(self) -> list[int]:
        return self.last.held if self.last else []

    def shared(self, ids: Sequence[int]) -> int:
        """Tokens that a prompt need not take in again; its last one always does."""
        return self.session.reusable(common_prefix(self.ids, ids[:-1]))


class Conversations:
    """At most `count` sessions, made when first needed; `figures` add up all of them.

    One generation runs at a time: beginning another one ends it.
    """

    def __init__(
        self,
        shards: LoadedShards,
        count: int = 1,
        *,
        concurrency: int = 1,
        predictor: str = AUTO,
    ) -> None:
        """`concurrency` and `predictor` are those of a session. Raises UserError for an encoder and
        for no conversations."""
        if count < 1:
            raise UserError("at least one conversation has to be kept", str(count))
        self.shards = shards
        self.figures = Figures(shards.runtime)
        self._count = count
        self._concurrency, self._predictor = concurrency, predictor
        self._kept = [self._new()]  # the one that was used last comes last

    def generate(
        self,
        ids: Sequence[int],
        options: GenerateOptions,
        decode: Decode | None = None,
        begun: Begun | None = None,
        halted: Callable[[], bool] = lambda: False,
    ) -> tuple[Generation, int]:
        """The continuation of a prompt, as `generation.generate`, and how many of its tokens are in
        a cache already. `halted` is asked before each call of the prompt.

        Raises UserError for senseless options.
        """
        kept = self._best(ids)
        taken = kept.session.cut(kept.shared(ids))
        kept.session.halted = halted
        kept.last = generate(kept.session, ids, options, decode, begun, taken=taken)
        self._kept.remove(kept)
        self._kept.append(kept)
        return kept.last, taken

    def clear(self) -> None:
        """Forget all of them; the figures stay."""
        for kept in self._kept:
            kept.session.reset()
            kept.last = None

    def _best(self, ids: Sequence[int]) -> _Kept:
        """The session with most of the prompt, unless that would cost too much of what it holds:
        then an unused one, or the one that was used longest ago."""
        found = [(kept.shared(ids), kept) for kept in self._kept]
        worth = [pair for pair in found if pair[0] and pair[0] * WORTH_KEEPING >= len(pair[1].ids)]
        if worth:
            return max(worth, key=lambda pair: pair[0])[1]
        unused = next((kept for kept in self._kept if not kept.ids), None)
        if unused is None and len(self._kept) < self._count:
            unused = self._new()
            self._kept.append(unused)
        return unused or self._kept[0]

    def _new(self) -> _Kept:
        return _Kept(
            Session(
                self.shards,
                concurrency=self._concurrency,
                predictor=self._predictor,
                figures=self.figures,
            )
        )


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
