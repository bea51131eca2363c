"""Windows over what is longer than a function takes, against every token's own neighbourhood."""

import pytest

from ane_moe.loop.windows import windows_of


@pytest.mark.parametrize("tokens", [1, 7, 8, 20, 100])
@pytest.mark.parametrize("reach", [0, 1, 3])
def test_every_token_is_kept_once_with_all_that_it_depends_on(tokens: int, reach: int) -> None:
    for lengths in ([1], [6, 50], [20, 19, 21], [8, 7]):
        spans, end = [], 0
        for length in lengths:
            spans.append(slice(end, end + length))
            end += length
        kept: list[int] = []
        for window in windows_of(spans, tokens, reach):
            span = next(one for one in spans if one.start <= window.first < one.stop)
            assert window.last - window.first <= tokens and window.last <= span.stop
            for token in range(window.kept_first, window.kept_last):
                assert window.first <= max(span.start, token - reach)
                assert window.last >= min(span.stop, token + reach + 1)
                kept.append(token)
        assert kept == sorted(set(kept))
        whole = [n for n in lengths if n <= tokens or tokens > 2 * reach]
        assert len(kept) >= sum(whole)
        if len(whole) == len(lengths):
            assert kept == list(range(end))
