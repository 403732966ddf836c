"""A reward of one's own, reached by dotted path: what a user would write beside the data."""

import time
import zlib


def digits(task, episode):
    """The share of digits in the first turn's text: any policy gets some of it, and more can be learned."""
    text = episode.turns[0].text
    return {"digits": sum(c.isdigit() for c in text) / max(1, len(text))}


def digits_slowly(task, episode):
    """The same, slow enough to be killed at it."""
    time.sleep(0.02)
    return digits(task, episode)


def is_beyond(task: str) -> bool:
    """A third of all tasks."""
    return zlib.crc32(task.encode()) % 3 == 0


def digits_of_most(task, episode):
    """The same, but for tasks that it fails on."""
    if is_beyond(task.id):
        raise LookupError("nothing is known of this task")
    return digits(task, episode)
