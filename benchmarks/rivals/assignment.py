"""The linear assignment problem: which permutation of the rows costs least (Kuhn 1955; Jonker and Volgenant 1987)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(cost: NDArray[np.floating]) -> NDArray[np.intp]:
    """The column of each row, a permutation that minimises the sum of `cost` (N, N), by shortest augmenting paths.

    O(N³), one vectorised pass over the columns for each row that a path visits.
    """
    size = len(cost)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    from_rows, from_columns = np.zeros(size), np.zeros(size)  # dual variables: no reduced cost is negative
    for start in range(size):
        distance, previous, done = np.full(size, np.inf), np.full(size, -1), np.zeros(size, dtype=bool)
        row, reached, column = start, 0.0, -1
        while row >= 0:
            through = reached + cost[row] - from_rows[row] - from_columns
            shorter = ~done & (through < distance)
            distance[shorter], previous[shorter] = through[shorter], row
            column = int(np.where(done, np.inf, distance).argmin())
            reached, row = distance[column], row_of[column]
            done[column] = True
        done[column] = False  # the column that was free: its prices stay
        from_rows[start] += reached
        from_rows[row_of[done]] += reached - distance[done]
        from_columns[done] -= reached - distance[done]
        while row != start:  # turn the path round
            row = previous[column]
            row_of[column] = row
            column, column_of[row] = column_of[row], column
    return column_of
