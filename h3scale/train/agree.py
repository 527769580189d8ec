"""What rank 0 does for all, so that all ranks know how it ended."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from h3scale.errors import H3Error, PeerLostError


def by_rank_0(act: Callable[[], Any], what: str, group: Any = None) -> Any:
    """What `act` gives on rank 0 (it is pickled), on every rank; every rank raises what it raises. Every rank calls this.

    An error that is not for people is rank 0's own; the others get a PeerLostError (69) that it failed to do `what`.
    """
    told: list[Any] = [None, None]  # the outcome, or what went wrong
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            told = [act(), None]
        except H3Error as error:
            failure, told = error, [None, (type(error), error.findings)]
        except Exception as error:
            failure, told = error, [None, (PeerLostError, [f"rank 0 failed to {what}"])]
    dist.broadcast_object_list(told, group=group)
    if failure is not None:
        raise failure
    if told[1] is not None:
        kind, findings = told[1]
        raise kind(findings)
    return told[0]
