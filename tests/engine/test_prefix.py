"""The prefix tree: what it finds, what it gives up first, and windows."""

import random

import pytest

from pdx.engine.pool import PagePool
from pdx.engine.prefix import WORTH_COPYING, PrefixTree

P = 8


def tree_of(windows=(None,), pages=20):
    pools = [PagePool(pages) for _ in windows]
    return PrefixTree(P, windows, pools), pools


def put(tree, pools, tokens, held_from=None):
    """Enter tokens as a finished request would; `held_from`: by group, the first page it still holds."""
    node, held_from = tree.root, held_from or [0] * len(pools)
    taken = []
    for at in range(0, len(tokens), P):
        pages = [None if at // P < first else pool.allocate() for pool, first in zip(pools, held_from, strict=True)]
        taken += [(pool, page) for pool, page in zip(pools, pages, strict=True) if page is not None]
        node = tree.insert(node, tuple(tokens[at : at + P]), pages)
    for pool, page in taken:
        pool.release(page)
    return node


def found(tree, tokens):
    match = tree.match(tokens, len(tokens))
    return len(match.nodes) * P + match.tokens


def test_the_longest_prefix_is_found():
    tree, pools = tree_of()
    a = list(range(100, 100 + 3 * P))
    put(tree, pools, a)
    assert found(tree, a) == 3 * P
    assert found(tree, [*a[: 2 * P], *range(P)]) == 2 * P
    assert found(tree, [1, *a]) == 0
    assert found(tree, a[: P - 1]) == P - 1  # a part of a page
    assert tree.match(a, 3 * P - 1).tokens == P - 1


def test_equal_beginnings_share_pages():
    tree, pools = tree_of()
    put(tree, pools, [*range(2 * P), *[50] * P])
    used = pools[0].idle
    put(tree, pools, [*range(2 * P), *[60] * P])
    assert (used, pools[0].idle) == (3, 4)
    assert pools[0].free == 16


def test_a_part_of_a_page_is_found_where_copying_pays():
    tree, pools = tree_of()
    put(tree, pools, list(range(P + 6)))  # a whole page and six tokens of the next
    assert found(tree, [*range(P + 5), 99, 99, 99]) == P + 5
    assert found(tree, [*range(P + 6), 99]) == P + 6
    assert found(tree, [*range(P + WORTH_COPYING), *[99] * P]) == P + WORTH_COPYING
    assert found(tree, [*range(P + WORTH_COPYING - 1), *[99] * P]) == P
    assert tree.match(list(range(P + 6)), P + 6, parts=False).tokens == 0


def test_prefixes_in_multiples_of_pages():
    tree, pools = tree_of()
    put(tree, pools, list(range(5 * P)))
    matches = [tree.match(list(range(5 * P)), 5 * P, multiple=m, parts=False) for m in (1, 2, 3, 6)]
    assert [len(match.nodes) for match in matches] == [5, 4, 3, 0]


def test_the_longest_idle_leaf_goes_first():
    tree, pools = tree_of()
    a, b = [*range(2 * P)], [*range(P), *[70] * P]
    put(tree, pools, a)
    put(tree, pools, b)
    pools[0].release(pools[0].share(tree.match(a, 2 * P).nodes[1].pages[0]))  # a's leaf is used again
    assert tree.evict(0)
    assert (found(tree, a), found(tree, b)) == (2 * P, P)
    assert tree.evict(0)
    assert tree.evict(0)
    assert not tree.evict(0)
    assert (found(tree, a), pools[0].free, list(tree.nodes())) == (0, 20, [])


def test_pages_in_use_are_not_evicted():
    tree, pools = tree_of()
    a = list(range(3 * P))
    put(tree, pools, a)
    held = [pools[0].share(node.pages[0]) for node in tree.match(a, 2 * P).nodes]
    assert tree.evict(0)
    assert not tree.evict(0)
    assert found(tree, a) == 2 * P
    for page in held:
        pools[0].release(page)
    assert tree.evict(0)


def test_a_hit_is_cut_to_what_the_window_still_holds():
    """Window 12 over pages of 8: a query at position q sees pages (q - 11) // 8 on."""
    tree, pools = tree_of((None, 12))
    a = list(range(5 * P))
    put(tree, pools, a, held_from=[0, 3])
    assert found(tree, a) == 5 * P  # sees pages 3 and 4
    assert found(tree, a[: 4 * P]) == 0  # would see pages 2 and 3, and so on down to none
    put(tree, pools, [*a[: 2 * P], *[90] * P])  # fills in pages 0 and 1 of the window group
    assert found(tree, a[: 4 * P]) == 2 * P
    assert tree.evict(1)  # the window page that has been idle longest: page 3 of a
    assert found(tree, a) == 2 * P


def test_window_pages_go_by_themselves_and_leaves_with_everything():
    tree, pools = tree_of((None, 8))
    put(tree, pools, list(range(4 * P)))
    for _ in range(4):
        assert tree.evict(1)
    assert (pools[0].idle, pools[1].free, len(list(tree.nodes()))) == (4, 20, 4)
    tree, pools = tree_of((None, 8))
    put(tree, pools, list(range(4 * P)))
    for _ in range(4):
        assert tree.evict(0)
    assert (pools[0].free, pools[1].free, list(tree.nodes())) == (20, 20, [])


def test_a_model_of_window_layers_alone_keeps_the_end_of_a_prefix():
    tree, pools = tree_of((8,))
    a = list(range(4 * P))
    put(tree, pools, a)
    assert tree.evict(0)
    assert tree.evict(0)
    assert found(tree, a) == 4 * P
    assert tree.evict(0)
    assert tree.evict(0)
    assert (found(tree, a), pools[0].free, list(tree.nodes())) == (0, 20, [])


def test_clear_lets_go_of_everything():
    tree, pools = tree_of((None, 8))
    node = put(tree, pools, list(range(4 * P)))
    held = pools[0].share(node.pages[0])
    tree.clear()
    assert not node.alive
    assert (pools[0].free, pools[1].free) == (19, 20)
    pools[0].release(held)
    assert pools[0].free == 20


@pytest.mark.parametrize("windows", [(None,), (None, 12), (12,), (12, 20)])
def test_random_use_leaks_nothing_and_can_always_be_evicted(windows):
    rng = random.Random(1)
    tree, pools = tree_of(windows, pages=30)
    for _ in range(3000):
        tokens = [rng.randrange(2) for _ in range(P * rng.randrange(1, 5) + rng.randrange(P))]
        needed = -(-len(tokens) // P)
        for group, pool in enumerate(pools):
            while pool.free < needed:
                assert tree.evict(group)
        put(tree, pools, tokens)
        for group, pool in enumerate(pools):
            kept = [node.pages[group] for node in tree.nodes() if node.pages[group] is not None]
            assert len(kept) == len(set(kept)) == pool.idle == 30 - pool.free
            assert len(tree._queues[group]) <= 2 * pool.pages + 1
    for group, pool in enumerate(pools):
        while tree.evict(group):
            pass
        assert pool.free == 30
    assert list(tree.nodes()) == []
