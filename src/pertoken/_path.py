"""A path: a beginning of a canonical token sequence (see `pertoken.canonical`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Path"]


class Path:
    """A beginning of a canonical token sequence: its last token, and the path before that.

    end: bytes of its text; starts: places where its last piece may begin, each with the beginning
    of the piece before as long as the cut between hangs on what follows; segment: where the text
    behind the last added token begins; cut: where that token begins, or -1; allowed: the row of
    `Canonical.row` once it is known, until it is no longer needed.
    """

    __slots__ = ("allowed", "cut", "end", "parent", "segment", "starts", "token")

    def __init__(
        self,
        parent: Path | None,
        token: int,
        end: int,
        starts: tuple[tuple[int, int], ...],
        segment: int,
        cut: int,
    ) -> None:
        self.parent, self.token, self.end = parent, token, end
        self.starts, self.segment, self.cut = starts, segment, cut
        self.allowed: npt.NDArray[np.bool_] | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens of the path."""
        return [path.token for path in self.chain[1:]]

    @property
    def chain(self) -> list[Path]:
        """The path's beginnings, shortest first, and itself."""
        found = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found[::-1]
