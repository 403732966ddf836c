"""Named tensors -> buckets of bytes with checksums, and back.

A bucket is one uint8 array holding whole tensors at aligned offsets. It crosses processes as a numpy array (bf16 has
no numpy type, bytes have), and is read back without a copy.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from rl.model import DTYPES

_ALIGNMENT = 64
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class ChecksumError(RuntimeError):
    """A bucket's bytes are not those that were published."""


@dataclass(frozen=True)
class Entry:
    name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bucket:
    entries: tuple[Entry, ...]
    nbytes: int
    checksum: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a weight version consists of.

    step: the learner's optimizer step it belongs to; probe: token ids of the probe sequence; probe_logprobs: float32
    [len(probe) - 1], the learner's log-probs of it, which whoever loads the version must reproduce. base: the tensors
    are a LoRA adapter's, on top of that version; None: they are the whole model.
    """

    version: int
    step: int
    dtype: str
    buckets: tuple[Bucket, ...]
    probe: tuple[int, ...]
    probe_logprobs: np.ndarray
    base: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buckets)


def plan_buckets(shapes: Mapping[str, Sequence[int]], dtype: str, bucket_bytes: int) -> list[Bucket]:
    """Group tensors, in order, into buckets of at most `bucket_bytes` (or one tensor)."""
    size = DTYPES[dtype].itemsize
    buckets: list[Bucket] = []
    entries: list[Entry] = []
    offset = 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape, dtype=np.int64)) * size
        if entries and offset + nbytes > bucket_bytes:
            buckets.append(Bucket(tuple(entries), offset))
            entries, offset = [], 0
        entries.append(Entry(name, tuple(shape), offset, nbytes))
        offset += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    if entries:
        buckets.append(Bucket(tuple(entries), offset))
    return buckets


def pack(bucket: Bucket, tensors: Mapping[str, Tensor], dtype: str) -> np.ndarray:
    """The bucket's bytes, uint8 [nbytes], from parameters of any dtype on any device."""
    packed = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for entry in bucket.entries:
        target = packed[entry.offset : entry.offset + entry.nbytes].view(DTYPES[dtype]).view(entry.shape)
        target.copy_(tensors[entry.name].detach())
    return packed.numpy()


def difference(old: np.ndarray, new: np.ndarray, dtype: str) -> np.ndarray | None:
    """What changed from one version of a bucket to the next, uint8: positions (uint32), then the new values.

    None where that is not smaller than half of the bucket. Lossless: values are compared and copied as bits.
    """
    word = _word(dtype)
    if old.nbytes != new.nbytes or new.nbytes // word.itemsize > np.iinfo(np.uint32).max:
        return None
    before, after = old.view(word), new.view(word)
    changed = np.flatnonzero(before != after)
    if len(changed) * (4 + word.itemsize) * 2 > new.nbytes:
        return None
    return np.concatenate([changed.astype(np.uint32).view(np.uint8), after[changed].view(np.uint8)])


def applied(old: np.ndarray, changes: np.ndarray, dtype: str) -> np.ndarray:
    """The next version of a bucket, from the one before and `difference`: a new array."""
    word = _word(dtype)
    count = len(changes) // (4 + word.itemsize)
    new = old.copy()
    new.view(word)[changes[: 4 * count].view(np.uint32)] = np.frombuffer(changes[4 * count :].tobytes(), word)
    return new


def _word(dtype: str) -> np.dtype[Any]:
    return np.dtype({2: np.uint16, 4: np.uint32}[DTYPES[dtype].itemsize])


def checksum(data: np.ndarray) -> str:
    """xxh3 of the bytes, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data.data)


def unpack(bucket: Bucket, data: np.ndarray, dtype: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) views into the bytes; nothing is copied, and the tensors must not be written to.

    Raises ChecksumError when the bytes are not those that were published.
    """
    if bucket.checksum and checksum(data) != bucket.checksum:
        raise ChecksumError(
            f"the bucket that starts with {bucket.entries[0].name} arrived with other bytes than were published"
        )
    with warnings.catch_warnings():
        # Arrays from the object store are read-only; torch has no such notion and warns for every one.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        whole = torch.from_numpy(data)
    for entry in bucket.entries:
        part = whole[entry.offset : entry.offset + entry.nbytes]
        yield entry.name, part.view(DTYPES[dtype]).view(entry.shape)


def block_of(name: str) -> int | None:
    """The block that a parameter belongs to, from its name; None is outside the blocks."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None
