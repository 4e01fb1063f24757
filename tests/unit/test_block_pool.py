"""Reference counts, prefix reuse and eviction of KV blocks."""

from array import array

import pytest

from farrier.runtime.block_pool import ROOT, BlockPool


def tokens(*ids: int) -> "array[int]":
    return array("i", ids)


def publish(pool: BlockPool, ids: list[int], root: int = ROOT) -> list[int]:
    """Computes and publishes the whole blocks of a sequence; returns its blocks, still referenced."""
    blocks = pool.allocate(len(ids) // pool.block_size)
    prefix_id = root
    for index, block in enumerate(blocks):
        start = index * pool.block_size
        prefix_id = pool.publish(prefix_id, tokens(*ids[start : start + pool.block_size]), block)
    return blocks


def found(pool: BlockPool, *ids: int) -> list[int]:
    return pool.lookup(ROOT, tokens(*ids))[0]


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(4, 2)
    first = pool.allocate(3)
    assert len(set(first)) == 3
    assert pool.num_free == 1
    with pytest.raises(ValueError, match="2 KV blocks were asked for, but only 1 are free"):
        pool.allocate(2)
    pool.release(first)
    assert pool.num_free == 4
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]


def test_a_published_prefix_is_found_by_whole_blocks() -> None:
    pool = BlockPool(8, 2)
    blocks = publish(pool, [1, 2, 3, 4, 5, 6])
    assert found(pool, 1, 2, 3, 4, 9) == blocks[:2]
    assert found(pool, 1, 2, 3) == blocks[:1]
    assert found(pool, 1, 2, 4, 4, 5, 6, 7) == blocks[:1]
    assert found(pool, 2, 1, 3, 4, 5) == []
    assert found(pool, 3, 4, 5, 6, 7) == [], "the middle of a sequence is not a prefix"


def test_the_last_token_is_never_found() -> None:
    pool = BlockPool(8, 2)
    blocks = publish(pool, [1, 2, 3, 4])
    assert found(pool, 1, 2, 3, 4, 5) == blocks
    assert found(pool, 1, 2, 3, 4) == blocks[:1]
    assert found(pool, 1, 2) == []
    assert found(pool, 1) == []


def test_the_same_tokens_after_different_prefixes_are_different() -> None:
    pool = BlockPool(8, 1)
    first = publish(pool, [1, 7])
    second = publish(pool, [2, 7])
    assert found(pool, 1, 7, 0) == first
    assert found(pool, 2, 7, 0) == second


def test_roots_do_not_see_each_other() -> None:
    pool = BlockPool(8, 1)
    own = pool.new_root()
    blocks = publish(pool, [1, 2], own)
    assert found(pool, 1, 2, 3) == []
    assert pool.lookup(own, tokens(1, 2, 3))[0] == blocks
    assert pool.lookup(pool.new_root(), tokens(1, 2, 3))[0] == []


def test_a_block_computed_twice_is_found_once_and_continues_either() -> None:
    pool = BlockPool(8, 1)
    first, second = publish(pool, [1]), publish(pool, [1, 2])
    assert found(pool, 1, 2, 3) == [first[0], second[1]]
    pool.release(second)
    assert found(pool, 1, 2, 3) == [first[0], second[1]]
    pool.release(first)
    pool.check()


def test_shared_blocks_stay_until_the_last_reference_goes() -> None:
    pool = BlockPool(3, 1)
    blocks = publish(pool, [1, 2])
    assert pool.count_idle(blocks) == 0
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.count_idle(blocks) == 2
    pool.share(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    pool.check()


def test_empty_blocks_go_first_then_the_least_recently_used() -> None:
    pool = BlockPool(5, 1)
    old, new = publish(pool, [1]), publish(pool, [2])
    pool.release(old)
    pool.release(new)
    assert not set(pool.allocate(3)) & {*old, *new}
    assert found(pool, 1, 0) == old
    pool.share(old)
    pool.release(old)  # used again: now the other one is older
    assert pool.allocate(1) == new
    assert found(pool, 2, 0) == []
    assert found(pool, 1, 0) == old
    assert pool.allocate(1) == old
    assert found(pool, 1, 0) == []


def test_a_prefix_outlives_what_continues_it() -> None:
    pool = BlockPool(3, 1)
    blocks = publish(pool, [1, 2, 3])
    pool.release(blocks)
    assert pool.allocate(1) == blocks[2:]
    assert found(pool, 1, 2, 3, 4) == blocks[:2]


def test_what_was_evicted_can_be_published_again() -> None:
    pool = BlockPool(2, 1)
    pool.release(publish(pool, [1, 2]))
    pool.release(pool.allocate(2))
    pool.check()
    blocks = publish(pool, [1, 2])
    assert found(pool, 1, 2, 3) == blocks
    pool.release(blocks)
    pool.check()


def test_check_reports_leaks() -> None:
    pool = BlockPool(3, 1)
    pool.check()
    blocks = pool.allocate(2)
    with pytest.raises(RuntimeError, match="are referenced although nothing runs"):
        pool.check()
    pool.release(blocks)
    pool.check()
    pool._empty.append(pool._empty[0])
    with pytest.raises(RuntimeError, match="not every block exactly once"):
        pool.check()
