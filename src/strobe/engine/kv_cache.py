"""Who owns which page of the KV cache. Page numbers only: the tensors are the runner's.

A page is in one of three states: free (no content worth keeping), cached (no sequence holds it, its
content may be reused, given back least recently used first) or held by one or more sequences. A full
page is known by a hash of its tokens and of all before them, so that a prompt that begins alike finds
it. A page that is not full is written only by a sequence that holds it alone: copy-on-write.

This module imports no torch.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from strobe.errors import StrobeError


class PageCopy(NamedTuple):
    """The content of page `source` is wanted in page `target` before the next forward pass."""

    source: int
    target: int


@dataclass(frozen=True)
class Prefix:
    """What a token sequence is looked up by: `hashes[i]` covers pages 0 to i, all full; `root` the salt."""

    root: bytes
    hashes: tuple[bytes, ...] = ()


@dataclass(eq=False)
class PageList:
    """The pages that one sequence holds, in token order; `hashes` are those of its full pages so far."""

    root: bytes = b""
    pages: array[int] = field(default_factory=lambda: array("i"))
    hashes: list[bytes] = field(default_factory=list)


class KvCache:
    """`num_pages` pages of `page_size` tokens.

    With `prefix_cache` the pages of released sequences stay findable until their room is needed.
    The hash is BLAKE2b-256 over (parent's hash, tokens), the first parent being the salt's: a client
    can neither guess nor forge its way into the pages of another salt.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Pages that can be handed out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages held by sequences."""
        return self.num_pages - self.available

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def most_pages(self, prompt: int, output: int, sequences: int = 1) -> int:
        """Pages that so many sequences of one prompt may come to hold together, each writing `output` tokens:
        they share those that the prompt fills."""
        shared = prompt // self.page_size
        return shared + sequences * (self.pages_for(prompt + output - 1) - shared)

    def prefix(self, tokens: Sequence[int], salt: bytes = b"") -> Prefix:
        """The hashes that `tokens` may share with others, without its last token's page.

        The last token is always left to run, for its logits.
        """
        root = parent = blake2b(salt, digest_size=32, person=b"strobe prefix").digest()
        hashes = []
        if self.prefix_cache:
            for index in range((len(tokens) - 1) // self.page_size):
                parent = self._chain(parent, tokens, index)
                hashes.append(parent)
        return Prefix(root, tuple(hashes))

    def acquire(self, prefix: Prefix) -> PageList:
        """A sequence's first pages, as far as they are cached."""
        held = PageList(prefix.root)
        for digest in prefix.hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1
            held.pages.append(page)
            held.hashes.append(digest)
        return held

    def missing(self, held: PageList, computed: int, upto: int) -> int:
        """Pages that `extend` would take; 0 in most steps of a sequence that decodes."""
        index, offset = divmod(computed, self.page_size)
        shared = offset > 0 and self._refs[held.pages[index]] > 1
        return max(0, -(-upto // self.page_size) - len(held.pages)) + shared

    def extend(self, held: PageList, computed: int, upto: int) -> PageCopy | None:
        """Make room for tokens `[computed, upto)`, to be written next; says what to copy first, if anything.

        Raises:
            StrobeError: fewer pages are available than `missing` says.
        """
        if self.missing(held, computed, upto) > self.available:
            raise StrobeError(f"the KV cache has {self.available} pages left, fewer than asked for")
        copy = None
        index, offset = divmod(computed, self.page_size)
        if offset > 0 and self._refs[held.pages[index]] > 1:
            copy = PageCopy(held.pages[index], self._take())
            self._refs[copy.source] -= 1
            held.pages[index] = copy.target
        while len(held.pages) * self.page_size < upto:
            held.pages.append(self._take())
        return copy

    def commit(self, held: PageList, tokens: Sequence[int], computed: int) -> None:
        """Make the pages that the first `computed` of `tokens` fill findable."""
        if not self.prefix_cache:
            return
        for index in range(len(held.hashes), computed // self.page_size):
            digest = self._chain(held.hashes[-1] if held.hashes else held.root, tokens, index)
            held.hashes.append(digest)
            page = held.pages[index]
            if digest not in self._page_of and page not in self._hash_of:
                self._page_of[digest] = page
                self._hash_of[page] = digest

    def fork(self, held: PageList) -> PageList:
        """A second owner of all these pages."""
        for page in held.pages:
            self._refs[page] += 1
        return PageList(held.root, held.pages[:], held.hashes.copy())

    def release(self, held: PageList) -> None:
        """Give all pages back. The last of them go first when room is needed: beginnings are shared most."""
        for page in reversed(held.pages):
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)
        del held.pages[:]
        held.hashes.clear()

    def clear(self) -> None:
        """Forget all cached prefixes; held pages stay held."""
        self._page_of.clear()
        self._hash_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def check(self, held: Iterable[PageList]) -> None:
        """Raise StrobeError unless free, cached and held pages add up and are held by `held` alone."""
        owners = Counter(page for pages in held for page in pages.pages)
        free, cached = Counter(self._free), set(self._cached)
        faults = [
            *(f"page {page} is free twice" for page, count in free.items() if count > 1),
            *(f"page {page} is free and cached" for page in free.keys() & cached),
            *(f"page {page} is free and findable" for page in free.keys() & self._hash_of.keys()),
            *(f"page {page} is cached and not findable" for page in cached - self._hash_of.keys()),
        ]
        for page in range(self.num_pages):
            if self._refs[page] != owners[page]:
                faults.append(f"page {page} counts {self._refs[page]} owners and has {owners[page]}")
            if (owners[page] == 0) != (page in free or page in cached):
                faults.append(f"page {page} is {'lost' if owners[page] == 0 else 'held and given away'}")
        if {page: digest for digest, page in self._page_of.items()} != self._hash_of:
            faults.append("hashes and pages do not match")
        if faults:
            raise StrobeError(f"the KV cache is inconsistent: {'; '.join(faults[:8])}")

    def _chain(self, parent: bytes, tokens: Sequence[int], index: int) -> bytes:
        start = index * self.page_size
        digest = blake2b(parent, digest_size=32)
        digest.update(array("q", tokens[start : start + self.page_size]))
        return digest.digest()

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
        self._refs[page] = 1
        return page
