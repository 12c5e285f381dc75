"""The page accounting against a memory that knows what every slot should hold."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from strobe.engine.kv_cache import KvCache, PageList
from strobe.errors import StrobeError

PAGE_SIZE = 4


@dataclass(eq=False)
class Owner:
    tokens: list[int]
    salt: bytes
    pages: PageList
    computed: int

    def content(self, position: int) -> tuple:
        """What a key depends on: every token up to its own. The salt stands for "may be seen by"."""
        return self.salt, tuple(self.tokens[: position + 1])


class CacheMachine(RuleBasedStateMachine):
    """Starts, grows, forks and ends sequences; every slot that one would read holds what it wrote."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.cache = KvCache(13, PAGE_SIZE)
        self.memory: dict[tuple[int, int], tuple] = {}
        self.live: list[Owner] = []

    def write(self, owner: Owner, upto: int) -> bool:
        if self.cache.missing(owner.pages, owner.computed, upto) > self.cache.available:
            with pytest.raises(StrobeError, match="pages left"):
                self.cache.extend(owner.pages, owner.computed, upto)
            return False
        copy = self.cache.extend(owner.pages, owner.computed, upto)
        if copy is not None:
            for offset in range(PAGE_SIZE):
                self.memory[copy.target, offset] = self.memory.get((copy.source, offset), ())
        for position in range(owner.computed, upto):
            page, offset = owner.pages.pages[position // PAGE_SIZE], position % PAGE_SIZE
            self.memory[page, offset] = owner.content(position)
        owner.computed = upto
        self.cache.commit(owner.pages, owner.tokens, upto)
        return True

    @rule(
        target=owners,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=25),
        salt=st.sampled_from([b"", b"a"]),
        share=st.floats(0, 1),
    )
    def start(self, tokens: list[int], salt: bytes, share: float) -> object:
        pages = self.cache.acquire(self.cache.prefix(tokens, salt))
        owner = Owner(tokens, salt, pages, len(pages.pages) * PAGE_SIZE)
        assert owner.computed < len(tokens)
        upto = owner.computed + max(1, int(share * (len(tokens) - owner.computed)))
        if not self.write(owner, upto):
            self.cache.release(pages)
            return multiple()
        self.live.append(owner)
        return owner

    @rule(owner=owners, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, owner: Owner, tokens: list[int]) -> None:
        if owner.computed == len(owner.tokens):
            owner.tokens += tokens
        self.write(owner, min(len(owner.tokens), owner.computed + len(tokens)))

    @rule(target=owners, owner=owners)
    def fork(self, owner: Owner) -> Owner:
        other = Owner(list(owner.tokens), owner.salt, self.cache.fork(owner.pages), owner.computed)
        other.tokens[owner.computed :] = []
        if not other.tokens:
            other.tokens = [0]
        self.live.append(other)
        return other

    @rule(owner=consumes(owners))
    def end(self, owner: Owner) -> None:
        self.cache.release(owner.pages)
        self.live.remove(owner)

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def consistent(self) -> None:
        self.cache.check(owner.pages for owner in self.live)
        held = {page for owner in self.live for page in owner.pages.pages}
        assert self.cache.used == len(held)
        assert self.cache.available == 13 - len(held)

    @invariant()
    def reads_what_it_wrote(self) -> None:
        for owner in self.live:
            for position in range(owner.computed):
                slot = owner.pages.pages[position // PAGE_SIZE], position % PAGE_SIZE
                assert self.memory[slot] == owner.content(position)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def hold(cache: KvCache, tokens: list[int], salt: bytes = b"") -> PageList:
    """A sequence that has run all its tokens."""
    pages = cache.acquire(cache.prefix(tokens, salt))
    cache.extend(pages, len(pages.pages) * cache.page_size, len(tokens))
    cache.commit(pages, tokens, len(tokens))
    return pages


def test_prompts_that_begin_alike_share_their_full_pages():
    cache = KvCache(20, PAGE_SIZE)
    first = hold(cache, [*range(10)])
    second = cache.acquire(cache.prefix([*range(8), 77, 78]))
    assert list(second.pages) == list(first.pages[:2])
    assert list(cache.acquire(cache.prefix([0, 1, 2, 99, 4, 5, 6, 7, 8])).pages) == []


def test_the_last_token_is_always_left_to_run():
    cache = KvCache(20, PAGE_SIZE)
    tokens = [*range(2 * PAGE_SIZE)]
    hold(cache, tokens)
    assert len(cache.acquire(cache.prefix(tokens)).pages) == 1


def test_salts_do_not_share():
    cache = KvCache(20, PAGE_SIZE)
    hold(cache, [*range(9)], b"alice")
    assert not cache.acquire(cache.prefix([*range(9)], b"bob")).pages
    assert len(cache.acquire(cache.prefix([*range(9)], b"alice")).pages) == 2


def test_a_page_depends_on_what_came_before_it():
    cache = KvCache(20, PAGE_SIZE)
    hold(cache, [1, 1, 1, 1, 5, 5, 5, 5, 0])
    assert not cache.acquire(cache.prefix([2, 2, 2, 2, 5, 5, 5, 5, 0])).pages


def test_least_recently_used_pages_go_first_and_ends_before_beginnings():
    cache = KvCache(4, PAGE_SIZE)
    old, new = [*range(9)], [*range(50, 54), 0]
    cache.release(hold(cache, old))
    cache.release(hold(cache, new))
    hold(cache, [*range(90, 98)])  # takes the one free page and one cached page
    assert len(cache.prefix(old).hashes) == 2
    assert len(cache.acquire(cache.prefix(old)).pages) == 1
    assert len(cache.acquire(cache.prefix(new)).pages) == 1


def test_without_prefix_cache_nothing_is_found_or_kept():
    cache = KvCache(6, PAGE_SIZE, prefix_cache=False)
    pages = hold(cache, [*range(9)])
    assert not cache.acquire(cache.prefix([*range(9)])).pages
    cache.release(pages)
    assert cache.available == 6
    cache.check([])


def test_a_fork_copies_only_the_page_that_it_writes():
    cache = KvCache(8, PAGE_SIZE)
    first = hold(cache, [*range(6)])
    second = cache.fork(first)
    copy = cache.extend(second, 6, 7)
    assert copy is not None
    assert (copy.source, copy.target) == (first.pages[1], second.pages[1])
    assert first.pages[0] == second.pages[0]
    assert cache.extend(first, 6, 7) is None, "the last owner writes in place"
    cache.check([first, second])


@pytest.mark.parametrize("fault", ["lost", "twice", "owner"])
def test_check_finds_a_fault(fault):
    cache = KvCache(8, PAGE_SIZE)
    held = [hold(cache, [*range(6)]), hold(cache, [*range(20, 31)])]
    cache.check(held)
    if fault == "lost":
        cache._free.pop()
    elif fault == "twice":
        cache._free.append(held[0].pages[0])
    else:
        held.pop()
    with pytest.raises(StrobeError, match="inconsistent: page"):
        cache.check(held)


def test_hashes_differ_wherever_tokens_or_salt_do():
    cache = KvCache(1, PAGE_SIZE)
    rng = random.Random(5)
    seen: dict[bytes, tuple] = {}
    for _ in range(2000):
        tokens = tuple(rng.randrange(3) for _ in range(9))
        salt = rng.choice([b"", b"\0", b"x"])
        for index, digest in enumerate(cache.prefix(tokens, salt).hashes):
            key = (salt, tokens[: (index + 1) * PAGE_SIZE])
            assert seen.setdefault(digest, key) == key
