"""Duplicates and near-duplicates in a stream of texts of any length, in a bounded number of bytes per text.

A text is its words in lower case. Its shingles are windows of six UTF-8 bytes (six letters, two Chinese characters),
its signature is the least hash of all shingles under 56 functions (MinHash), and the share of equal places in two
signatures estimates the Jaccard similarity of their shingles. Texts that agree in one of eight bands of seven places
are compared, first by signature, then shingle by shingle: where a thousand sentences follow one template, some of the
many estimates are far too high. Of such a pair the one that came first stays.

Kept per text: its first 384 bytes, 112 bytes of signature, eight of its hash, eight entries of eight bytes in a table
that is at most 60 % full, and its id. What is found does not depend on how the stream is cut into batches.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BANDS, PLACES = 8, 7  # similarity 0.9 meets in a band with probability 0.99, 0.85 with 0.95, 0.6 with 0.2
SIGNATURE = BANDS * PLACES
SHINGLE_BYTES = 6
HEAD_BYTES = 384  # of a text are compared shingle by shingle; of what is longer the signature decides as well
ESTIMATE_MARGIN = 0.1  # two standard deviations: below `near` by more, no exact comparison is made
MAX_FILLED = 0.6
FIRST_SLOTS = 1 << 12

# Chinese characters and their punctuation alone: nothing in it has another compatible form that matters.
PLAIN_CHINESE = re.compile("[一-鿿，。？！、；：“”‘’（）《》…—]+")

_NOT_WORD = re.compile(r"[\W_]+")
_ASCII_WORDS = bytes(c if chr(c).isalnum() else 0x20 for c in range(128)).lower() + bytes(128)
# Odd multipliers permute the 32-bit numbers; fixed, so that signatures are the same in every run.
_MULTIPLIERS = np.random.default_rng(56).integers(1 << 31, 1 << 32, SIGNATURE, dtype=np.uint32) | np.uint32(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_BATCH = 2048  # texts whose shingles are in memory at a time


@dataclass(frozen=True)
class Match:
    """An earlier text: its id, and how similar it is; `exact` if its words are the same."""

    id: str
    similarity: float
    exact: bool


class Seen:
    """The texts that were kept so far. `near`: similarity from which a text counts as seen; None: only equal words."""

    def __init__(self, near: float | None) -> None:
        self._near = near
        self._ids: list[str] = []
        self._heads = bytearray()
        self._ends = np.zeros(1024, np.uint64)  # of heads
        self._hashes = np.zeros(1024, np.uint64)
        self._signatures = np.zeros((1024, SIGNATURE), np.uint16)
        self._table = _Table(FIRST_SLOTS)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, texts: Sequence[str], ids: Sequence[str]) -> list[Match | None]:
        """For each text the earlier one it repeats; a text that repeats none is kept under its id, and answers None.

        Texts are cleaned by `rules`: short, valid Unicode, with at least one letter or digit.
        """
        found: list[Match | None] = []
        for start in range(0, len(texts), _BATCH):
            found += self._add(texts[start : start + _BATCH], ids[start : start + _BATCH])
        return found

    def _add(self, texts: Sequence[str], ids: Sequence[str]) -> list[Match | None]:
        words = [comparable(text) for text in texts]
        hashes = np.frombuffer(b"".join(hashlib.blake2b(word, digest_size=8).digest() for word in words), np.uint64)
        signatures = _signatures(words)
        keys = _band_keys(signatures) if self._near is not None else hashes[:, None]
        owners = self._table.lookup(keys.ravel()).reshape(keys.shape)
        return self._decide(ids, words, hashes, signatures, keys, owners)

    def _decide(
        self,
        ids: Sequence[str],
        words: Sequence[bytes],
        hashes: np.ndarray,
        signatures: np.ndarray,
        keys: np.ndarray,
        owners: np.ndarray,
    ) -> list[Match | None]:
        """One text after the other where texts share a key with each other, all at once where they do not."""
        shared = _shared(keys, owners < 0)
        claimed: dict[int, int] = {}
        found: list[Match | None] = [None] * len(ids)
        kept = np.ones(len(ids), bool)
        first = number = len(self._ids)  # `number` is what the next text gets if it is kept
        stored = 0  # rows before this one are kept or rejected
        self._grow(first + len(ids))
        for row in np.flatnonzero((shared | (owners >= 0)).any(1)).tolist():
            self._keep(ids, words, hashes, signatures, range(stored, row), number)
            number, stored = number + row - stored, row
            mates = {owner for owner in owners[row].tolist() if owner >= 0}
            own = keys[row][shared[row]].tolist()
            mates.update(claimed[key] for key in own if key in claimed)
            found[row] = self._closest(words[row], hashes[row], signatures[row], mates)
            if found[row] is not None:
                kept[row], stored = False, row + 1
                continue
            for key in own:
                claimed.setdefault(key, number)
        self._keep(ids, words, hashes, signatures, range(stored, len(ids)), number)
        self._insert(keys[kept], first)
        return found

    def _keep(
        self,
        ids: Sequence[str],
        words: Sequence[bytes],
        hashes: np.ndarray,
        signatures: np.ndarray,
        rows: range,
        number: int,
    ) -> None:
        stop = number + len(rows)
        heads = [word[:HEAD_BYTES] for word in words[rows.start : rows.stop]]
        self._ends[number:stop] = len(self._heads) + np.cumsum([len(head) for head in heads], dtype=np.int64)
        self._heads += b"".join(heads)
        self._hashes[number:stop] = hashes[rows.start : rows.stop]
        self._signatures[number:stop] = signatures[rows.start : rows.stop]
        self._ids.extend(ids[rows.start : rows.stop])

    def _closest(self, words: bytes, text_hash: np.uint64, signature: np.ndarray, mates: set[int]) -> Match | None:
        """The most similar of the texts of these numbers, the first of equals; None below `near`."""
        if not mates:
            return None
        numbers = np.array(sorted(mates))
        equal = np.flatnonzero(self._hashes[numbers] == text_hash)
        if len(equal):
            return Match(self._ids[numbers[equal[0]]], 1.0, True)
        if self._near is None:
            return None
        estimates = (self._signatures[numbers] == signature).mean(1)
        best, similar = -1, 0.0
        promising = np.flatnonzero(estimates >= self._near - ESTIMATE_MARGIN).tolist()
        mine = _shingles(words[:HEAD_BYTES]) if promising else set()
        for place in promising:
            other = self._head(int(numbers[place]))
            theirs = _shingles(other)
            both = len(mine & theirs)
            here = both / (len(mine) + len(theirs) - both)
            if max(len(words), len(other)) >= HEAD_BYTES:
                here = min(here, float(estimates[place]))
            if here > similar:
                best, similar = int(numbers[place]), here
        return Match(self._ids[best], similar, False) if similar >= self._near else None

    def _head(self, number: int) -> bytes:
        start = int(self._ends[number - 1]) if number else 0
        return bytes(self._heads[start : int(self._ends[number])])

    def _insert(self, keys: np.ndarray, first: int) -> None:
        """The keys of texts `first`..; a key that is taken stays with its first owner."""
        needed = (first + len(keys)) * keys.shape[1]
        if needed > MAX_FILLED * self._table.slots:
            slots = self._table.slots
            while needed > MAX_FILLED * slots:
                slots *= 2
            self._table = _Table(slots)  # the old one is gone before the new one is filled
            for start in range(0, first, _BATCH):
                stop = min(first, start + _BATCH)
                self._table.insert(self._keys_of(start, stop), start)
        self._table.insert(keys, first)

    def _keys_of(self, start: int, stop: int) -> np.ndarray:
        if self._near is None:
            return self._hashes[start:stop, None]
        return _band_keys(self._signatures[start:stop])

    def _grow(self, needed: int) -> None:
        if needed > len(self._hashes):
            size = max(needed, len(self._hashes) * 3 // 2)
            # In place: the system moves pages instead of copying, and no second copy exists meanwhile.
            self._ends.resize(size, refcheck=False)
            self._hashes.resize(size, refcheck=False)
            self._signatures.resize((size, SIGNATURE), refcheck=False)


class _Table:
    """64-bit keys to numbers, open addressing; the first owner of a key keeps it."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._tags = np.zeros(slots, np.uint32)
        self._owners = np.zeros(slots, np.uint32)  # 0: free; otherwise number + 1

    def lookup(self, keys: np.ndarray) -> np.ndarray:
        """The owner of each key, i64 [n], -1 where there is none."""
        found = np.full(len(keys), -1, np.int64)
        tags, slots = self._places(keys)
        waiting = np.arange(len(keys))
        while len(waiting):
            owners = self._owners[slots[waiting]]
            hit = (owners > 0) & (self._tags[slots[waiting]] == tags[waiting])
            found[waiting[hit]] = owners[hit].astype(np.int64) - 1
            waiting = waiting[(owners > 0) & ~hit]
            slots[waiting] = (slots[waiting] + 1) & (self.slots - 1)
        return found

    def insert(self, keys: np.ndarray, first: int) -> None:
        """Keys [n, b] of the texts numbered from `first`."""
        numbers = np.repeat(np.arange(first + 1, first + 1 + len(keys), dtype=np.uint32), keys.shape[1])
        flat, at = np.unique(keys.ravel(), return_index=True)  # the first of equal keys
        numbers = numbers[at]
        tags, slots = self._places(flat)
        waiting = np.arange(len(flat))
        while len(waiting):
            at = slots[waiting]
            owners = self._owners[at]
            taken = (owners > 0) & (self._tags[at] == tags[waiting])
            free = owners == 0
            self._owners[at[free]] = numbers[waiting[free]]  # of several that want one slot, the last written has it
            won = free & (self._owners[at] == numbers[waiting])
            self._tags[at[won]] = tags[waiting[won]]
            # Two keys of one text may want one slot: the tag says which of them has it.
            settled = taken | (won & (self._tags[at] == tags[waiting]))
            waiting = waiting[~settled]
            slots[waiting] = (slots[waiting] + 1) & (self.slots - 1)

    def _places(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (keys >> np.uint64(32)).astype(np.uint32), (keys & np.uint64(self.slots - 1)).astype(np.int64)


def comparable(text: str) -> bytes:
    """What two texts must share to be the same: words in lower case, without punctuation, as UTF-8."""
    if text.isascii():
        return b" ".join(text.encode().translate(_ASCII_WORDS).split())
    # Normalising costs more than all the rest together.
    folded = text if PLAIN_CHINESE.fullmatch(text) else unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip().encode()


def _shingles(words: bytes) -> set[bytes]:
    return {words[start : start + SHINGLE_BYTES] for start in range(max(1, len(words) - SHINGLE_BYTES + 1))}


def _signatures(words: Sequence[bytes]) -> np.ndarray:
    """MinHash signatures u16 [n, SIGNATURE]; a text shorter than a shingle is one shingle."""
    padded = [word.ljust(SHINGLE_BYTES, b"\0") for word in words]
    lengths = np.array([len(word) for word in padded])
    data = np.frombuffer(b"".join(padded) + bytes(8), np.uint8)
    windows = np.ndarray(len(data) - 8, np.dtype("<u8"), data, strides=(1,)) & np.uint64((1 << 8 * SHINGLE_BYTES) - 1)
    hashes = windows * _MIX
    hashes = ((hashes ^ (hashes >> np.uint64(29))) * _MIX >> np.uint64(32)).astype(np.uint32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # A window that runs into the next text is no shingle of this one: it must never be the least.
    inside = np.ones(len(hashes), bool)
    for back in range(1, SHINGLE_BYTES):
        inside[starts + lengths - back] = False
    hashes = hashes[inside]
    starts = np.concatenate([[0], np.cumsum(lengths - SHINGLE_BYTES + 1)[:-1]])
    signatures = np.empty((len(words), SIGNATURE), np.uint16)
    for place, multiplier in enumerate(_MULTIPLIERS):
        least = np.minimum.reduceat(hashes * multiplier, starts)
        signatures[:, place] = (least * np.uint32(0x85EBCA6B)) >> np.uint32(16)
    return signatures


def _band_keys(signatures: np.ndarray) -> np.ndarray:
    """One 64-bit key per band, u64 [n, BANDS], of signatures [n, SIGNATURE]."""
    bands = signatures.reshape(len(signatures), BANDS, PLACES).astype(np.uint64)
    keys = np.arange(1, BANDS + 1, dtype=np.uint64)[None, :] * _MIX
    for place in range(PLACES):
        keys = (keys ^ bands[:, :, place]) * _MIX
        keys = keys ^ (keys >> np.uint64(31))
    return keys


def _shared(keys: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Which keys, bool [n, b], occur in several texts of this batch and belong to no earlier one."""
    _, back, counts = np.unique(keys.ravel(), return_inverse=True, return_counts=True)
    return (counts[back] > 1).reshape(keys.shape) & free
