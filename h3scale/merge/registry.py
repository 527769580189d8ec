"""The methods as data: which function, what it must see at once, where it applies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from h3scale.config.merge import Options, Spectral
from h3scale.merge import breadcrumbs, iso_cts, model_stock, slerp, spectrum, ties, wudi
from h3scale.merge.consensus_ta import consensus_ta
from h3scale.merge.dare import dare
from h3scale.merge.dare_ties import dare_ties
from h3scale.merge.della import della
from h3scale.merge.delta import Delta, LowRank, Site, Survey, dense
from h3scale.merge.iso_c import iso_c
from h3scale.merge.linear import linear, shares
from h3scale.merge.resm import resm
from h3scale.merge.task_arithmetic import task_arithmetic
from h3scale.merge.tsv_m import tsv_m

WHOLE = Site()  # all of a tensor that nobody has named
Merge = Callable[[Tensor, Sequence[Delta], Sequence[float], Any, Site], Delta]


@dataclass(frozen=True)
class Method:
    """A method. `survey`: what it finds out about a whole tensor before rows of it can be merged alone.

    `on_matrices`: it needs whole matrices; all else gets the weighted mean. `paper`: its number at arXiv. `numbers`: of a method
    that is a sum, what each delta is multiplied by. `num_bytes`: what a method on matrices takes for one, by its shape and the
    number of models, when their deltas are dense; factors take less.
    """

    title: str
    paper: str | None
    merge: Merge
    survey: Survey | None = None
    on_matrices: bool = False
    numbers: Callable[[Sequence[float]], Sequence[float]] | None = None
    num_bytes: Callable[[tuple[int, ...], int], int] = spectrum.num_bytes

    def takes(self, shape: tuple[int, ...], options: Options, is_embedding: bool = False) -> bool:
        """Whether the method itself is used on a tensor, or the mean."""
        if not self.on_matrices:
            return True
        left_out = is_embedding and isinstance(options, Spectral) and options.embeddings == "mean"
        return len(shape) == 2 and not left_out


METHODS: dict[str, Method] = {
    "linear": Method("Linear", "2203.05482", linear, numbers=shares),
    "slerp": Method("SLERP", None, slerp.slerp, survey=slerp.survey),
    "task_arithmetic": Method("Task arithmetic", "2212.04089", task_arithmetic, numbers=tuple),
    "ties": Method("TIES", "2306.01708", ties.ties, survey=ties.survey),
    "dare": Method("DARE", "2311.03099", dare),
    "dare_ties": Method("DARE with TIES", "2311.03099", dare_ties),
    "della": Method("DELLA", "2406.11617", della),
    "breadcrumbs": Method("Model Breadcrumbs", "2312.06795", breadcrumbs.breadcrumbs, survey=breadcrumbs.survey),
    "consensus_ta": Method("Consensus TA", "2405.07813", consensus_ta),
    "model_stock": Method("Model Stock", "2403.19522", model_stock.model_stock, survey=model_stock.survey),
    "tsv_m": Method("TSV-M", "2412.00081", tsv_m, on_matrices=True),
    "iso_c": Method("Iso-C", "2502.04959", iso_c, on_matrices=True),
    "iso_cts": Method("Iso-CTS", "2502.04959", iso_cts.iso_cts, on_matrices=True, num_bytes=iso_cts.num_bytes),
    "wudi": Method("WUDI", "2503.08099", wudi.wudi, on_matrices=True, num_bytes=wudi.num_bytes),
    "resm": Method("RESM (reconstruction)", "2502.06876", resm, on_matrices=True),
}


def merged_delta(
    method: str, base_X: Tensor, deltas: Sequence[Delta], options: Options, site: Site = WHOLE, is_embedding: bool = False
) -> Delta:
    """The change of one tensor (or of a block of it, see Site) that a method makes of the models' changes, scaled."""
    chosen, weights = METHODS[method], options.weights_of(len(deltas))
    merge = chosen.merge if chosen.takes(tuple(base_X.shape), options, is_embedding) else linear
    change = merge(base_X, deltas, weights, options, site)
    if options.scaling == 1:
        return change
    if isinstance(change, LowRank):
        return LowRank(change.left_OR * options.scaling, change.right_RI)
    values = dense(change)
    return values.mul(torch.tensor(options.scaling, dtype=values.dtype))
