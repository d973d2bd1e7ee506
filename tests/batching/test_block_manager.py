"""Who holds a block, what can be found in one, and which goes first when room is needed."""

import pytest

from batching.block_manager import BlockManager, content_name


def names(*contents: int) -> list[bytes]:
    chain: list[bytes] = []
    for content in contents:
        chain.append(content_name(chain[-1] if chain else b"", bytes([content])))
    return chain


def test_blocks_are_found_up_to_where_texts_part() -> None:
    blocks = BlockManager(8, 1)
    held = blocks.allocate(3)
    for block, name in zip(held, names(1, 2, 3), strict=True):
        blocks.name(block, name)

    assert blocks.find(names(1, 2, 9)) == held[:2]
    assert blocks.find(names(9, 2, 3)) == []
    assert blocks.find(names(1, 2, 3, 4)) == held


def test_a_name_depends_on_everything_before_the_block() -> None:
    (first, second), (other, after_other) = names(1, 2), names(2, 2)
    assert len({first, second, other, after_other}) == 4
    assert all(len(name) == 16 for name in (first, second))


def test_a_shared_block_is_free_when_its_last_holder_is_gone() -> None:
    blocks = BlockManager(3, 1)
    held = blocks.allocate(2)
    blocks.share(held[:1])

    blocks.free(held)
    assert (blocks.num_free, blocks.num_holders(held[0]), blocks.num_holders(held[1])) == (2, 1, 0)
    blocks.free(held[:1])
    assert blocks.num_free == 3
    with pytest.raises(AssertionError, match="nobody holds it"):
        blocks.free(held[:1])


def test_room_is_made_of_nameless_blocks_first_then_of_what_was_unused_longest_and_ends_first() -> None:
    blocks = BlockManager(5, 1)
    early, late = blocks.allocate(2), blocks.allocate(2)
    for table, text in ((early, names(1, 2)), (late, names(3, 4))):
        for block, name in zip(table, text, strict=True):
            blocks.name(block, name)
    blocks.free(early)
    blocks.free(late)
    assert (blocks.num_free, blocks.num_named) == (5, 4)

    blocks.allocate(1)
    assert blocks.num_named == 4
    blocks.share(blocks.find(names(1)))
    blocks.allocate(1)
    assert blocks.find(names(1, 2)) == early[:1]
    blocks.free(early[:1])
    blocks.allocate(2)
    assert blocks.find(names(3, 4)) == []
    assert blocks.find(names(1)) == early[:1]


def test_the_same_content_is_found_in_the_block_that_had_it_first() -> None:
    blocks = BlockManager(4, 1)
    one, two = blocks.allocate(2)
    blocks.name(one, names(1)[0])
    blocks.name(two, names(1)[0])

    assert blocks.find(names(1)) == [one]
    blocks.free([one, two])
    assert (blocks.num_free, blocks.num_named) == (4, 1)
