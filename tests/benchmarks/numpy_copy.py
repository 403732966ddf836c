"""Seconds of one numpy copy of so many bytes: the yardstick of publishing and loading."""

import json
import sys
import time

import numpy as np

source = np.ones(int(sys.argv[1]), np.uint8)
target = np.empty_like(source)
np.copyto(target, source)
started = time.perf_counter()
for _ in range(5):
    np.copyto(target, source)
print(json.dumps({"seconds": (time.perf_counter() - started) / 5}))
