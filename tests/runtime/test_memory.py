"""The budget of expanded weights."""

import gc

from ane_moe.runtime.memory import PATIENCE, Memory, weight_memory


class Owner:
    pass


def test_who_comes_first_keeps_and_no_more_than_the_limit_is_kept() -> None:
    memory, owners = Memory(100), [Owner() for _ in range(4)]
    assert [memory.take(owner, 40) for owner in owners] == [True, True, False, False]
    assert memory.take(owners[2], 20)
    assert memory.kept_bytes == 100


def test_what_is_kept_ends_with_its_owner() -> None:
    memory, owner = Memory(100), Owner()
    memory.expect(owner, 90)
    assert memory.take(owner, 90)
    del owner
    gc.collect()
    assert memory.kept_bytes == memory.wanted_bytes == 0
    assert memory.take(Owner(), 90)


def test_where_not_everything_fits_only_what_is_used_again_and_again_is_worth_keeping() -> None:
    memory, owners = Memory(100), [Owner() for _ in range(2)]
    memory.expect(owners[0], 100)
    assert memory.patience == 1
    memory.expect(owners[1], 1)
    assert memory.patience == PATIENCE > 1


def test_a_limit_counts_what_is_stored_and_is_never_below_nothing() -> None:
    assert weight_memory(8, 5_000_000).limit_bytes == 3_000_000
    assert weight_memory(8, 9_000_000).limit_bytes == 0
    assert weight_memory(None, 9_000_000).limit_bytes > 0
