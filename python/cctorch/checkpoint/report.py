"""What saving came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What saving came to, over all ranks; sizes in bytes.

    Attributes:
        raw: of the tensors.
        predicted: of their chunks, before compression.
        stored: of all data, compressed and, where it is small, not.
        stored_chunks: of what is compressed.
        slots: of the chunks' slots, with head room and with those that were too small.
        file: of the whole file.
        chunks: their number.
        overflowed: chunks that did not fit into their slots and went to the end of the file.
        lossless_instead: chunks that broke their error bound and were stored without loss.
        compressing: seconds, summed over threads and ranks.
        writing: seconds of the writing threads.
        hidden: those of ``writing`` that passed while compression went on.
        seconds: from the call to the file in its place.
    """

    raw: int
    predicted: int
    stored: int
    stored_chunks: int
    slots: int
    file: int
    chunks: int
    overflowed: int
    lossless_instead: int
    compressing: float
    writing: float
    hidden: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Bytes of the tensors per byte of the file."""
        return self.raw / self.file
