"""Records into rows of a fixed number of tokens."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` in rows that hold at most `capacity` tokens.

    Longer records get a row of their own (and are cut by the collator). The result does not depend on anything but
    the arguments.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = min(lengths[index], capacity)
        room = min((r for r in by_room if r >= need), default=None)
        if room is None:
            row_id, room = len(rows), capacity
            rows.append([])
        else:
            row_id = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
        rows[row_id].append(index)
        by_room.setdefault(room - need, []).append(row_id)
    return rows
