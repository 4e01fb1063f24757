"""The blocks of the paged KV cache: who holds them, and which hold prefixes that others can reuse."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = 0
"""The prefix id of the empty prefix."""


class BlockPool:
    """A fixed number of KV blocks with reference counts and prefix reuse. Every operation is O(1) a block.

    A full block whose KV is computed can be *published*: found again by its tokens and everything before them.
    "Everything before them" is one number, the prefix id of the block before. The table is keyed by the pair
    (prefix id, tokens), so that a lookup hashes both and compares both: a hash collision cannot serve wrong KV.
    A published block nobody references keeps its contents until the pool runs out of blocks that hold nothing;
    then the least recently used goes first. Nothing ever moves, so block tables only grow.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Published blocks without references, least recently used first."""
        self._published: dict[tuple[int, bytes], int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}
        """Published block → its key."""
        self._prefix_ids = [ROOT] * num_blocks
        self._last_prefix_id = ROOT

    @property
    def num_free(self) -> int:
        """Blocks `allocate` can hand out."""
        return len(self._empty) + len(self._idle)

    def new_root(self) -> int:
        """Another prefix id for the empty prefix: what is published after it is found only through it."""
        self._last_prefix_id += 1
        return self._last_prefix_id

    def lookup(self, root: int, tokens: "array[int]") -> tuple[list[int], int]:
        """The published blocks that hold the longest prefix of `tokens`, and that prefix's id.

        At least the last token is left out: computing it is what yields the next one's logits, and a shared block
        is never written. The blocks are not referenced yet; `share` them before anything else is allocated.
        """
        size = self.block_size
        blocks: list[int] = []
        prefix_id = root
        for start in range(0, len(tokens) - size, size):
            block = self._published.get((prefix_id, tokens[start : start + size].tobytes()))
            if block is None:
                break
            blocks.append(block)
            prefix_id = self._prefix_ids[block]
        return blocks, prefix_id

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of these published blocks `share` would take out of the free ones."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks to write into, evicting cached prefixes if need be. The caller checks `num_free` first."""
        if count > self.num_free:
            raise ValueError(f"{count} KV blocks were asked for, but only {self.num_free} are free.")
        blocks = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each block of a sequence, in the sequence's order."""
        # Last block first: a prefix outlives what continues it, which could not be found without it.
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def publish(self, prefix_id: int, tokens: "array[int]", block: int) -> int:
        """Lets others find `block`, which holds the KV of `tokens` after the prefix `prefix_id`.

        Returns the id of the prefix that ends with it. When another block already holds the same, that one stays
        the one to be found.
        """
        key = (prefix_id, tokens.tobytes())
        holder = self._published.setdefault(key, block)
        if holder == block:
            self._keys[block] = key
            self._prefix_ids[block] = self.new_root()
        return self._prefix_ids[holder]

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._published[self._keys.pop(block)]
        return block

    def check(self) -> None:
        """Raises RuntimeError unless nobody references a block and every block is accounted for, once."""
        if any(self._references):
            held = [block for block, count in enumerate(self._references) if count]
            raise RuntimeError(f"KV blocks {held} are referenced although nothing runs.")
        if self.num_free != self.num_blocks or len({*self._empty, *self._idle}) != self.num_blocks:
            raise RuntimeError("The free KV blocks are not every block exactly once.")
        if self._keys.keys() != self._idle.keys() or len(self._published) != len(self._keys):
            raise RuntimeError("The published KV blocks are not the idle ones.")
