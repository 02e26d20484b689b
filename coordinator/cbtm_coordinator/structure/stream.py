"""One safetensors file read as it streams by: its header first, then each tensor's statistics, block by block.

Memory is that of the header and of one block, whatever the file's size. Calls back as early as anything is known, so
that a file that is wrong in its header is refused before its payload is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cbtm_common.errors import IntegrityError
from cbtm_common.safetensors_header import (
    ITEM_BYTES,
    PREFIX_BYTES,
    SafetensorsHeader,
    TensorEntry,
    header_bytes,
    parse_header,
)
from cbtm_coordinator.structure.statistics import FLOATS, Statistics

OnHeader = Callable[[SafetensorsHeader], None]
# Called with the name of each tensor of floats, when it has been read to its end, or holds what is no number.
OnTensor = Callable[[str, Statistics], None]


class SafetensorsStream:
    """Fed with all bytes of a file of `size`, in order. What the callbacks raise passes through."""

    def __init__(self, where: str, size: int, on_header: OnHeader, on_tensor: OnTensor) -> None:
        self._where = where
        self._size = size
        self._on_header = on_header
        self._on_tensor = on_tensor
        # Bytes before the payload, until there are `_wanted`.
        self._begin = bytearray()
        self._wanted = PREFIX_BYTES
        self._left: Iterator[tuple[str, TensorEntry]] | None = None
        self._name = ""
        self._due = 0
        self._item = 1
        self._statistics: Statistics | None = None
        # Less than one value.
        self._rest = b""

    def feed(self, chunk: bytes) -> None:
        """Raises IntegrityError when the file is no safetensors file."""
        data = memoryview(chunk)
        while self._left is None and len(data):
            missing = self._wanted - len(self._begin)
            self._begin += data[:missing]
            data = data[missing:]
            if len(self._begin) == self._wanted:
                self._open()
        while len(data):
            if self._due == 0:
                self._next()
            taken, data = data[: self._due], data[self._due :]
            self._due -= len(taken)
            self._add(taken)

    def finish(self) -> None:
        """After the last byte. Raises IntegrityError when the file ended too early."""
        if self._left is None or self._due:
            raise IntegrityError(f"{self._where}: the safetensors file ends in the middle")
        self._finish_empty()

    def _open(self) -> None:
        """What was asked for of the beginning has come."""
        if self._wanted == PREFIX_BYTES:
            self._wanted += header_bytes(bytes(self._begin), file_bytes=self._size, where=self._where)
            if self._wanted > PREFIX_BYTES:
                return
        header = parse_header(bytes(self._begin[PREFIX_BYTES:]), file_bytes=self._size, where=self._where)
        self._begin.clear()
        self._on_header(header)
        self._left = iter(header.tensors.items())

    def _next(self) -> None:
        """The next tensor that has bytes; the header says that there is one while bytes come."""
        assert self._left is not None
        for name, entry in self._left:
            self._start(name, entry)
            if self._due:
                return
            self._end()
        raise IntegrityError(f"{self._where}: bytes come after its last tensor")

    def _finish_empty(self) -> None:
        assert self._left is not None
        for name, entry in self._left:
            self._start(name, entry)
            self._end()

    def _start(self, name: str, entry: TensorEntry) -> None:
        self._name, self._due, self._item = name, entry.end - entry.begin, ITEM_BYTES[entry.dtype]
        count = self._due // self._item
        self._statistics = Statistics(entry.dtype, count) if entry.dtype in FLOATS else None

    def _add(self, data: memoryview) -> None:
        if self._statistics is not None:
            if self._rest:
                data = memoryview(self._rest + bytes(data))
            whole = len(data) // self._item * self._item
            self._rest = bytes(data[whole:])
            self._statistics.add(data[:whole])
            if not self._statistics.is_finite:
                self._on_tensor(self._name, self._statistics)
        if self._due == 0:
            self._end()

    def _end(self) -> None:
        if self._statistics is not None:
            self._on_tensor(self._name, self._statistics)
        self._statistics = None
