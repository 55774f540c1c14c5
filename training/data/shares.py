"""How a row of images is cut over the processes of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """One process of several, and what it gets of a row of things.

    Parameters
    ----------
    rank : int
        Number of the process.
    count : int
        Number of processes.
    """

    rank: int = 0
    count: int = 1

    def bounds(self, length: int) -> tuple[int, int]:
        """First position of the part of this process, and the one after its last.

        Examples
        --------
        >>> [Share(rank, 2).bounds(5) for rank in range(2)]
        [(0, 2), (2, 5)]
        """
        return length * self.rank // self.count, length * (self.rank + 1) // self.count

    def even_bounds(self, length: int) -> tuple[int, int]:
        """The same in pairs: every part begins at an even position.

        Images of even and of odd number form halves of a task, which so stay what they are.

        Examples
        --------
        >>> [Share(rank, 2).even_bounds(7) for rank in range(2)]
        [(0, 4), (4, 7)]
        """
        first, stop = self.bounds((length + 1) // 2)
        return min(2 * first, length), min(2 * stop, length)
