"""Outlines of masks as polygons. Imports no torch."""

import numpy as np


def mask_to_polygons(mask: np.ndarray) -> list[list[int]]:
    """Return the outline of each connected part of a mask as a COCO polygon [x0, y0, x1, y1, …].

    Polygons follow the borders of the pixels, so drawing them gives the mask again, with its holes filled. Pixels that
    touch only at a corner belong to different parts.

    Args:
        mask: bool [H, W].
    """
    padded = np.pad(mask.astype(bool), 1)
    # The four pixels around each grid point (y, x), 0 ≤ y ≤ H, 0 ≤ x ≤ W.
    top_left, top_right, bottom_left, bottom_right = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    is_diagonal = (top_left == bottom_right) & (top_right == bottom_left) & (top_left != top_right)
    is_corner = top_left ^ top_right ^ bottom_left ^ bottom_right
    y, x = np.nonzero(is_corner | is_diagonal)  # in the order of rows
    repeats = np.where(is_diagonal[y, x], 2, 1)  # at a diagonal, two outlines meet
    copy = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)  # 0 or 1
    y, x = np.repeat(y, repeats), np.repeat(x, repeats)
    # Along a row or column of the grid, edges connect the corners 0–1, 2–3, … The first of two copies ends an edge from
    # the left. Its other edge goes up if the pixel top left is set, else down.
    goes_down = is_diagonal[y, x] & ~top_left[y, x]
    by_column = np.lexsort((copy ^ goes_down, y, x))
    along_row = np.arange(len(x)) ^ 1
    along_column = np.empty_like(along_row)
    along_column[by_column] = by_column[np.arange(len(x)) ^ 1]
    starts = bottom_right[y, x]  # the first corner of an outline; at that of a hole, this pixel is not set
    points, row_next, column_next = np.stack([x, y], 1).tolist(), along_row.tolist(), along_column.tolist()
    polygons, visited = [], np.zeros(len(x), bool)
    for start in range(len(x)):
        if visited[start]:
            continue
        polygon, corner = [], start
        while not visited[corner]:
            other = row_next[corner]
            visited[[corner, other]] = True
            polygon += points[corner] + points[other]
            corner = column_next[other]
        if starts[start]:
            polygons.append(polygon)
    return polygons
