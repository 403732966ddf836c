"""Reward functions that fail at some tasks until they are mended."""

import os
import time
from pathlib import Path

from rl.reward import final_answer


def _fails(task) -> bool:
    return int(task.answer) % 3 == 0 and not Path(os.environ["GRADING_MENDED"]).exists()


def raises(task, episode):
    if _fails(task):
        raise RuntimeError("no such grader")
    return final_answer(task, episode)


def dies(task, episode):
    if _fails(task):
        os._exit(9)
    return final_answer(task, episode)


def hangs(task, episode):
    if _fails(task):
        time.sleep(100)
    return final_answer(task, episode)


def sees_the_key(task, episode):
    return float("MY_KEY" in os.environ)
