"""Many small records in two tensors: data-loading workers share them instead of copying them.

A worker that only reads a Python object still writes its reference count, so that the memory page it is on is copied,
and after an epoch each worker has nearly all of a list of dicts for itself. Tensors stay shared, whether workers are
forked or started anew.
"""

import itertools
import marshal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch

Record = TypeVar("Record")


class PackedList(Sequence, Generic[Record]):
    """A list that is fixed once it is made, its items kept as bytes.

    Args:
        items: plain data: tuples, lists, dicts, text and numbers.
        make: what gives back an item from its plain data, such as a NamedTuple's ``_make``.

    Raises:
        ValueError: an item is not plain data, or nested beyond what any honest one is.
    """

    def __init__(self, items: Iterable[Any], make: Callable[[Any], Record]) -> None:
        self._make = make
        packed = [marshal.dumps(item) for item in items]
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, packed)], dtype=np.int64))
        self._bytes = torch.from_numpy(np.frombuffer(b"".join(packed), dtype=np.uint8).copy())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]  # from the end too; beyond it an IndexError
        start, end = self._ends[index : index + 2].tolist()
        return self._make(marshal.loads(memoryview(self._bytes.numpy())[start:end]))

    def __iter__(self) -> Iterator[Record]:
        ends, content = self._ends.tolist(), memoryview(self._bytes.numpy())
        for start, end in itertools.pairwise(ends):
            yield self._make(marshal.loads(content[start:end]))
