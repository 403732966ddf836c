"""Small values that others hold references to: Ray 2.60 forgets to free them.

A value of up to 100 KB that an actor's own call returned lies in that actor's heap. It is freed where the actor's own
last reference goes. If another process's reference goes later, as the controller's to a group does, the value stays
for ever: its reference count is gone and nobody looks again.
"""

from typing import Any

import ray
from ray._private import worker


class Owned:
    """The references that this actor hands on. Not safe for more than one thread."""

    def __init__(self) -> None:
        self._ids: set[bytes] = set()

    def add(self, *refs: Any) -> None:
        self._ids |= {ref.binary() for ref in refs}

    def free(self) -> None:
        """Free what nobody refers to any more."""
        core: Any = worker.global_worker
        held = {bytes.fromhex(key.decode()) for key in core.core_worker.get_all_reference_counts()}
        for gone in self._ids - held:
            ray.ObjectRef(gone)  # a last reference of our own, whose end frees the value
        self._ids &= held
