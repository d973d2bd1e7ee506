"""Graph sizes: the numbers of rows at which decode steps are captured; steps of fewer are filled up to the next."""

#: Fewer rows share too little.
_LEAST_SHARING = 32
#: Rows between one captured size and the next, from so many rows on. Padding costs about as much as it adds rows.
_STRIDES = ((0, 2), (8, 8), (128, 16), (256, 32), (512, 64))


def graph_sizes(num_rows: int) -> list[int]:
    """At how many rows graphs are captured, so that up to `num_rows` can run; ascending."""
    sizes, size = [], 0
    while size < num_rows:
        size += next(stride for start, stride in reversed(_STRIDES) if size >= start)
        sizes.append(size)
    return sizes


def sharing_sizes(sizes: list[int]) -> list[int]:
    """Those of `sizes` that are captured with shared prefixes too: fewer, since each costs time at the start."""
    chosen: list[int] = []
    for size in sizes:
        if size >= _LEAST_SHARING and (not chosen or 3 * size >= 4 * chosen[-1]):
            chosen.append(size)
    return sorted({*chosen, sizes[-1]})
