"""Packed rows as tensors. Shape suffixes: B rows, S tokens a row, T = B x S tokens, G segments, N records."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from h3scale.data.store import Tokens

IGNORE = -100  # a target that costs nothing, torch's default ignore_index
PADDING, PROMPT, RESPONSE = 0, 1, 2  # roles of a token


@dataclass(frozen=True)
class Batch:
    """Rows of packed records, all (B, S). A row's records cannot see each other: positions start at 0 again.

    input_ids, position_ids: int64.
    targets: int64, the token that each position has to predict, IGNORE where none is asked for; no shift is needed.
    target_weights: how much each target counts, float32: 1 in responses, `prompt_weight` in prompts.
    alignment_ids: int64, the record's alignment for every token, -1 on padding. roles: int8, PADDING, PROMPT or RESPONSE.
    record_ids: int64, which record a token is of, -1 on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    target_weights: Tensor
    alignment_ids: Tensor
    roles: Tensor
    record_ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def collate(
    rows: Sequence[Sequence[int] | np.ndarray], records: Tokens, length: int, pad_id: int, prompt_weight: float = 0.0
) -> Batch:
    """Tensors of some rows, each a list of record numbers, padded to `length` tokens.

    `prompt_weight` above 0 asks for the prompts' tokens as well (a base learns to read). A record that reaches over the
    end of the row is cut there. What is left of a row is a segment of its own: padding sees only padding.
    """
    ids_G, sizes_G = _segments(rows, records, length)
    is_padding_G = ids_G < 0
    ends_G = np.cumsum(sizes_G)
    starts_G = ends_G - sizes_G
    tokens_T = records.gather(ids_G, sizes_G, pad_id)
    response_T = (tokens_T >> records.response_bit).astype(np.int8)
    input_ids_T = (tokens_T & records.id_mask).astype(np.int64)
    position_ids_T = np.arange(len(tokens_T)) - np.repeat(starts_G, sizes_G)
    roles_T = response_T + np.int8(PROMPT)
    targets_T = np.empty(len(tokens_T), np.int64)
    targets_T[:-1] = input_ids_T[1:]
    weights_T = np.empty(len(tokens_T), np.float32)
    weights_T[:-1] = response_T[1:]
    if prompt_weight > 0:
        weights_T[weights_T == 0] = prompt_weight
    weights_T[ends_G - 1] = 0  # the last token of a record predicts nothing of the next
    for g in np.flatnonzero(is_padding_G):
        weights_T[starts_G[g] : ends_G[g]] = 0
        roles_T[starts_G[g] : ends_G[g]] = PADDING
    targets_T[weights_T == 0] = IGNORE
    labels_G = np.where(is_padding_G, np.int64(-1), records.labels[ids_G])
    shape = (len(rows), length)
    return Batch(
        *(
            torch.from_numpy(array.reshape(shape))
            for array in (
                input_ids_T,
                position_ids_T,
                targets_T,
                weights_T,
                np.repeat(labels_G, sizes_G),
                roles_T,
                np.repeat(ids_G, sizes_G),
            )
        )
    )


def _segments(rows: Sequence[Sequence[int] | np.ndarray], records: Tokens, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Record numbers and sizes of all segments of all rows, (G,) int64; number -1 is the padding at the end of a row."""
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for row in rows:
        row_ids = np.asarray(row, np.int64)
        ends = np.minimum(np.cumsum(records.lengths[row_ids]), length)
        row_sizes = np.diff(ends, prepend=0)
        used = int(ends[-1]) if len(ends) else 0
        if row_sizes.size and row_sizes.min() == 0:  # nothing of a record that begins after the row's end
            row_ids, row_sizes = row_ids[row_sizes > 0], row_sizes[row_sizes > 0]
        ids.append(row_ids)
        sizes.append(row_sizes)
        if used < length:
            ids.append(np.array([-1]))
            sizes.append(np.array([length - used]))
    return np.concatenate(ids), np.concatenate(sizes)
