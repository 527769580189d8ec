"""The disk under a run: whether there is room for its models, and one line when it refuses to take them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from h3scale.checkpoint.expected import expected_shapes
from h3scale.checkpoint.torch_files import is_refusal, not_whole
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import OutputError, StorageError
from h3scale.log import logger
from h3scale.model.trainable import group_of, whole_shape
from h3scale.train.engine import Run, ranks_per_node

STATES = 3  # that a checkpoint has of each trained parameter: the fp32 master and two moments of AdamW
RUST = "(os error "  # in the plain Exceptions of tokenizers
GB = 1e9


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, whatever says that `folder`, or a file in it, cannot be written is a StorageError (74). For each rank by itself."""
    try:
        yield
    except OSError as error:
        raise _refused(error.filename or folder, folder, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _refused(folder, folder, str(error)) from error
    except Exception as error:
        told = is_refusal(error)
        if not told and not (type(error) is Exception and RUST in str(error)):
            raise
        why = not_whole(error) if told else str(error)
        raise _refused(folder, folder, why) from error


def _refused(what: object, folder: Path, reason: str) -> StorageError:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    first = next(iter(reason.splitlines()), "")
    return StorageError(f"{what}: cannot be written: {first} ({shutil.disk_usage(there).free / GB:.1f} GB are free)")


def check_space(recipe: TrainRecipe, run: Run, folder: Path) -> None:
    """OutputError (73) where not even one model fits beside what is there; a warning where those kept at once may not."""
    one, free = model_bytes(recipe, run), shutil.disk_usage(folder).free
    at_once = one * (3 if recipe.evaluation and recipe.evaluation.keep_best else 1)  # the best, the next best, the last
    if recipe.save.every:
        at_once += recipe.save.keep * state_bytes(run)
    if free < one:
        raise OutputError(
            f"{recipe.out}: the model it leaves takes {one / GB:.1f} GB, and {free / GB:.1f} GB are free (works: another place)"
        )
    if free < at_once:
        logger.warning(
            "%s: what evaluation.keep_best and save keep takes up to %.1f GB at once, and %.1f GB are free",
            recipe.out, at_once / GB, free / GB,
        )  # fmt: skip


def model_bytes(recipe: TrainRecipe, run: Run) -> int:
    """What one model that is kept takes on disk, but for a little: a checkpoint of all ranks (ZeRO-3), or a folder in fp32."""
    if run.zero_stage == 3:
        return state_bytes(run)
    shapes = expected_shapes(run.config.to_dict(), Path(recipe.out))
    return torch.float32.itemsize * sum(prod(shape) for shape in shapes.values())


def state_bytes(run: Run) -> int:
    """What a checkpoint takes that a run can go on from, likewise."""
    total = 0
    for name, parameter in run.engine.module.named_parameters():
        copies = run.ep_size if group_of(name) == "experts" else 1  # a rank knows its own experts
        each = STATES * torch.float32.itemsize if parameter.requires_grad else parameter.dtype.itemsize
        total += copies * prod(whole_shape(parameter)) * each
    return total


def has_room_in_memory(run: Run) -> bool:
    """Whether every host can hold what its ranks copy of a checkpoint. Every rank calls this.

    By what the system calls available, half as much again as needed: a batch system may allow a job less.
    """
    needed = state_bytes(run) * ranks_per_node(run.world_size) // run.world_size
    has_room = torch.tensor(int(psutil.virtual_memory().available > 1.5 * needed), device=run.engine.device)
    dist.all_reduce(has_room, dist.ReduceOp.MIN)
    return bool(has_room)
