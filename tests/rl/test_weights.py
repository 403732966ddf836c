"""Named tensors -> buckets -> the same tensors, to the bit, or an error."""

import numpy as np
import pytest
import torch

from rl.model import DTYPES
from rl.weights import ChecksumError, applied, checksum, difference, pack, plan_buckets, unpack

SHAPES = {"a": (3, 5), "scalar": (), "b": (7,), "big": (40, 10), "c": (2, 2, 2)}


def tensors_of(shapes, dtype):
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(DTYPES[dtype]) for name, shape in shapes.items()}


def publish(tensors, dtype, bucket_bytes):
    """(bucket with its checksum, read-only bytes as they come out of the object store)."""
    published = []
    for bucket in plan_buckets({n: tuple(t.shape) for n, t in tensors.items()}, dtype, bucket_bytes):
        data = pack(bucket, tensors, dtype)
        data.flags.writeable = False
        published.append((type(bucket)(bucket.entries, bucket.nbytes, checksum(data)), data))
    return published


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 400, 10**6])
def test_round_trip_is_exact(dtype, bucket_bytes):
    tensors = tensors_of(SHAPES, dtype)
    received = [pair for bucket, data in publish(tensors, dtype, bucket_bytes) for pair in unpack(bucket, data, dtype)]
    assert [name for name, _ in received] == list(SHAPES)
    for name, tensor in received:
        assert tensor.dtype == DTYPES[dtype]
        assert torch.equal(tensor, tensors[name])


def test_fp32_masters_are_published_as_the_generators_bf16():
    """What the generator loads is the rounding that torch itself does."""
    masters = tensors_of({"w": (33,)}, "float32")
    ((bucket, data),) = publish(masters, "bfloat16", 1000)
    assert torch.equal(dict(unpack(bucket, data, "bfloat16"))["w"], masters["w"].bfloat16())


def test_buckets_by_hand():
    """float32, at most 128 bytes a bucket, tensors at multiples of 64."""
    shapes = {"a": (16,), "b": (16,), "c": (1,), "d": (16,), "huge": (100,), "e": (2,)}
    planned = [[(e.name, e.offset, e.nbytes) for e in b.entries] for b in plan_buckets(shapes, "float32", 128)]
    assert planned == [
        [("a", 0, 64), ("b", 64, 64)],  # full to the byte
        [("c", 0, 4), ("d", 64, 64)],  # c takes 4 bytes and the place of 64
        [("huge", 0, 400)],  # a tensor is never cut
        [("e", 0, 8)],
    ]
    assert [b.nbytes for b in plan_buckets(shapes, "float32", 128)] == [128, 128, 448, 64]
    assert plan_buckets({}, "float32", 128) == []


@pytest.mark.parametrize("bucket_bytes", [64, 200, 4096])
def test_no_bucket_is_over_its_size_but_for_one_tensor(bucket_bytes):
    for bucket in plan_buckets(SHAPES, "bfloat16", bucket_bytes):
        assert bucket.nbytes <= bucket_bytes + 63 or len(bucket.entries) == 1
        assert all(e.offset % 64 == 0 for e in bucket.entries)


@pytest.mark.parametrize("at", [0, 70, -1])
def test_one_flipped_bit_is_found(at):
    """The last byte is padding: it too was published as a zero."""
    ((bucket, data),) = publish(tensors_of(SHAPES, "bfloat16"), "bfloat16", 10**6)
    damaged = data.copy()
    damaged[at] ^= 1
    with pytest.raises(ChecksumError, match="starts with a "):
        list(unpack(bucket, damaged, "bfloat16"))
    with pytest.raises(ChecksumError):
        list(unpack(bucket, data[:-64], "bfloat16"))
    list(unpack(bucket, data, "bfloat16"))


def test_the_same_weights_always_have_the_same_checksum():
    """A restarted learner proves itself by it: padding must not hold whatever memory held before."""
    first, second = (publish(tensors_of(SHAPES, "float32"), "float32", 200) for _ in range(2))
    assert [b.checksum for b, _ in first] == [b.checksum for b, _ in second]
    assert len({b.checksum for b, _ in first}) == len(first)


def test_received_tensors_are_views():
    """Zero-copy: a bucket is in memory once."""
    ((bucket, data),) = publish(tensors_of(SHAPES, "float32"), "float32", 10**6)
    start, end = data.ctypes.data, data.ctypes.data + data.nbytes
    assert all(start <= t.data_ptr() < end for _, t in unpack(bucket, data, "float32"))


def test_tied_parameters_travel_once_and_arrive_tied(tiny_lm):
    tensors = dict(tiny_lm.named_parameters())
    assert "lm_head.weight" not in tensors
    published = publish(tensors, "float32", 5000)
    assert len(published) > 2
    logits = tiny_lm(torch.arange(9)[None]).logits.detach()
    with torch.no_grad():
        for p in tiny_lm.parameters():
            p.zero_()
        for bucket, data in published:
            for name, tensor in unpack(bucket, data, "float32"):
                tiny_lm.get_parameter(name).copy_(tensor)
        assert torch.equal(tiny_lm(torch.arange(9)[None]).logits, logits)
    assert np.any(logits.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_changed_makes_the_next_version_to_the_bit_and_is_no_more_than_that(dtype):
    tensors = tensors_of({"a": (300,), "b": (5, 7)}, dtype)
    ((_, old),) = publish(tensors, dtype, 10**6)
    tensors["a"][17], tensors["b"][4, 6], tensors["a"][3] = (
        float("nan"),
        -0.0,
        1e-30,
    )  # compared as bits, not as numbers
    ((_, new),) = publish(tensors, dtype, 10**6)
    changes = difference(old, new, dtype)
    assert len(changes) == 3 * (4 + DTYPES[dtype].itemsize)
    assert np.array_equal(applied(old, changes, dtype), new)
    changes.flags.writeable = False
    assert np.array_equal(applied(old, changes, dtype), new)
    assert len(difference(old, old, dtype)) == 0


def test_a_bucket_that_changed_throughout_is_sent_whole():
    ((_, old),) = publish(tensors_of({"a": (300,)}, "bfloat16"), "bfloat16", 10**6)
    assert difference(old, ~old, "bfloat16") is None
    assert difference(old, old[:-64], "bfloat16") is None
