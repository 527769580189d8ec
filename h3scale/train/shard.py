"""This rank's part of a parameter and of its gradient, in fp32, whatever ZeRO stage cut them.

ZeRO-3 cuts every parameter in equal parts, the last one padded; ZeRO-1 and 2 keep parameters whole and cut the optimizer's master
weights, a parameter's anywhere or not at all on this rank. Experts are divided over the EP ranks before. DeepSpeed 0.19.8.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from h3scale.model.trainable import group_of, whole_shape


@dataclass(frozen=True)
class Shard:
    """The flat positions `begin` to `stop` of a parameter, without padding; `shape` is the whole parameter's on its EP rank.

    Stacked experts have three dimensions; `first_expert` is the number, among all, of the EP rank's first.
    """

    name: str
    parameter: Any  # ZeRO puts its attributes on the parameter
    shape: tuple[int, ...]
    begin: int
    stop: int
    first_expert: int

    @classmethod
    def of(cls, module: nn.Module, name: str, parameter: nn.Parameter) -> "Shard":
        """Of a parameter of an engine's module, found there under `name`."""
        shape, place = whole_shape(parameter), _place(parameter)
        layer: Any = module.get_submodule(name.rsplit(".", 2)[0])
        first = layer.ep_rank * shape[0] if group_of(name) == "experts" else 0
        return cls(name, parameter, shape, place.start, min(place.stop, prod(shape)), first)

    def __len__(self) -> int:
        return max(0, self.stop - self.begin)

    def experts(self) -> Iterator[tuple[int, int, int]]:
        """The experts that this part touches: (number among all, first flat position inside it, last + 1)."""
        size = prod(self.shape[1:])
        for local in range(self.begin // size, -(-self.stop // size)):
            low, high = max(self.begin - local * size, 0), min(self.stop - local * size, size)
            if low < high:
                yield self.first_expert + local, low, high

    def values(self) -> Tensor:
        """The master weights as they are now; of a frozen parameter its own values."""
        from deepspeed.utils import safe_get_local_fp32_param

        if _fragment(self.parameter):
            return _fragment(self.parameter).hp_fragment
        if not _is_cut(self.parameter):
            return self.parameter.detach().flatten()[self.begin : self.stop].float()
        found = safe_get_local_fp32_param(self.parameter) if self.parameter.requires_grad else self.parameter.ds_tensor
        return found[: len(self)]

    def fill(self, pieces: Iterable[Tensor]) -> None:
        """Writes the flat values, in order, into the master weights, and into the weights themselves where they are cut.

        Each piece is rounded to where it goes from its own dtype; padding becomes 0. Whole weights (ZeRO-0 to 2) are left
        as they are: they have been read on every rank.
        """
        self._write(pieces, self._held())

    def fill_beside(self, pieces: Iterable[Tensor], beside: Mapping[int, Tensor]) -> None:
        """As `fill`, into what the optimizer has beside the masters: of each flat tensor of masters, by its address, a like one."""
        held = self._held()[-1:]
        if not held:
            return
        master = held[0]
        address = max(start for start in beside if start <= master.data_ptr())
        place = (master.data_ptr() - address) // master.element_size()
        self._write(pieces, [beside[address].view(-1)[place : place + len(master)]])

    def _write(self, pieces: Iterable[Tensor], targets: list[Tensor]) -> None:
        at = 0
        for target in targets:
            target[len(self) :].zero_()
        for piece in pieces:
            for target in targets:
                target[at : at + len(piece)].copy_(piece)
            at += len(piece)

    @property
    def is_cut(self) -> bool:
        """Whether ZeRO-3 cut the parameter: there are no whole weights."""
        return _is_cut(self.parameter)

    def _held(self) -> list[Tensor]:
        """What this rank keeps of the parameter beside whole weights: its cut weights and masters, flat, with padding."""
        if not _is_cut(self.parameter):
            return [_fragment(self.parameter).hp_fragment] if _fragment(self.parameter) else []
        if not self.parameter.requires_grad:
            return [self.parameter.ds_tensor]
        # DeepSpeed's public call takes all values at once, in fp32 on the device: twice the largest shard at a start.
        masters, _ = self.parameter._z3_optimizer._get_fp32_opt_state_partition(self.parameter, release_swap_buffers=True)
        return [self.parameter.ds_tensor, masters]

    def add_gradient(self, more: Tensor) -> None:
        """Adds to the gradient of this part, the mean over the ranks; after the last backward of a step, before engine.step."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        if _is_cut(self.parameter):
            padded = safe_get_local_grad(self.parameter)
            padded[: len(self)] += more
            safe_set_local_grad(self.parameter, padded)
        else:
            self._fragment_of_gradient().add_(more)

    def gather(self, part: Tensor) -> Tensor:
        """The parameter put together from all ranks' parts (values of any meaning), in its shape and the part's dtype.

        A collective over the ranks that share the parameter; nothing is sent where there is one.
        """
        if _is_cut(self.parameter):
            padded = part.new_zeros(self.parameter.ds_tensor.numel())
            padded[: len(self)] = part
            flat, group = padded, self.parameter.ds_process_group
            if dist.get_world_size(group) > 1:
                flat = part.new_empty(dist.get_world_size(group) * len(padded))
                dist.all_gather_into_tensor(flat, padded, group=group)
            return flat[: prod(self.shape)].view(self.shape)
        flat = part.new_zeros(prod(self.shape))
        flat[self.begin : self.stop] = part
        if dist.get_world_size(self.parameter._dp_group) > 1:
            dist.all_reduce(flat, group=self.parameter._dp_group)
        return flat.view(self.shape)

    def _fragment_of_gradient(self) -> Tensor:
        found = _fragment(self.parameter).get_lp_grad_fragment(self.parameter._index_in_param_group).view(-1)
        # with ZeRO-1, or one rank, DeepSpeed may keep the whole parameter's
        return found if found.numel() == len(self) else found[self.begin : self.stop]


def _is_cut(parameter: Any) -> bool:
    return hasattr(parameter, "ds_tensor")


def _fragment(parameter: Any) -> Any:
    """Where DeepSpeed keeps this rank's master weights of a whole parameter; None when it has none of them."""
    return getattr(parameter, "_hp_mapping", None)


def _place(parameter: Any) -> range:
    if _is_cut(parameter):
        length = parameter.ds_tensor.numel()
        return range(dist.get_rank(parameter.ds_process_group) * length, (dist.get_rank(parameter.ds_process_group) + 1) * length)
    if not hasattr(parameter, "_hp_mapping"):  # no master weights: frozen, or ZeRO-0 in fp32
        return range(parameter.numel())
    address = parameter._hp_mapping.lp_fragment_address if parameter._hp_mapping else None
    return range(address.start, address.start + address.numel) if address else range(0)
