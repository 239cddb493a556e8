"""vLLM's request objects of task sets."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING

from loraf_serve.vllm.naming import lora_path

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class LoraRequests:
    """vLLM's request object of each task set. An id is never reused, because vLLM would keep applying its first set.

    Args:
        first_id: lower ids belong to vLLM's warm-up.
        idle: the number of unused sets to remember, as many as the workers keep.
    """

    def __init__(self, first_id: int, idle: int):
        self._ids = itertools.count(first_id)
        self._idle = idle
        self._requests: OrderedDict[str, LoRARequest] = OrderedDict()

    def get(self, key: str, in_use: Collection[Hashable]) -> LoRARequest:
        """Returns a set's request object.

        Args:
            key: the set's name.
            in_use: names of the sets in use, which must keep their ids.
        """
        from vllm.lora.request import LoRARequest

        if key not in self._requests:
            self._requests[key] = LoRARequest(lora_name=key, lora_int_id=next(self._ids), lora_path=key)
        self._requests.move_to_end(key)
        for name in list(self._requests):
            if len(self._requests) - len(in_use) <= self._idle:
                break
            if name not in in_use:
                del self._requests[name]
        return self._requests[key]

    def forget(self, digest: str) -> list[int]:
        """Removes every set of a checkpoint. Returns their ids."""
        keys = [key for key in self._requests if key.startswith(lora_path(digest, ""))]
        return [self._requests.pop(key).lora_int_id for key in keys]
