"""Warnings from the figures that are there already: a loss that jumps, an expert that is hardly used any more.

Once per episode: a warning comes back when what it says has been over in between.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from h3scale.config.recipe import Guards
from h3scale.log import logger

WINDOW = 100  # steps that a loss is compared with
WARM_UP = 20  # steps before the first comparison: a standard deviation of fewer says little
LEAST_SPREAD = 1e-3  # of the mean: a loss that hardly changes has not jumped


class Watch:
    """Looks at the lines of one run, in order. For one rank only: it speaks. `experts`: by name the alignment of each."""

    def __init__(self, guards: Guards, experts: Mapping[str, str | None]):
        self.guards, self.experts = guards, dict(experts)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.spiking = False
        self.idle_steps = dict.fromkeys(experts, 0)

    def take(self, line: dict[str, float]) -> dict[str, int]:
        """Warns where an episode begins with this line; gives `warning/WHAT: 1` for it, which belongs into the line."""
        return self._spike(line) | self._collapse(line)

    def state(self) -> dict[str, Any]:
        """What a run has to keep of it."""
        return {"losses": list(self.losses), "spiking": self.spiking, "idle_steps": self.idle_steps}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        self.losses.extend(state["losses"])
        self.spiking, self.idle_steps = state["spiking"], dict(state["idle_steps"])

    def _spike(self, line: dict[str, float]) -> dict[str, int]:
        loss = line.get("lm")
        if loss is None:
            return {}
        before, many = self.spiking, len(self.losses)
        mean = statistics.fmean(self.losses) if many else loss
        spread = max(statistics.stdev(self.losses) if many > 1 else 0.0, LEAST_SPREAD * abs(mean))
        limit = mean + self.guards.spike_sigmas * spread
        self.spiking = many >= WARM_UP and loss > limit
        # A jump counts for no more than what would just be none: it does not hide the next one, and one that lasts gets usual.
        self.losses.append(limit if self.spiking else loss)
        if before or not self.spiking:
            return {}
        logger.warning("step %d: lm jumps to %.4g; the %d steps before had %.4g +- %.2g", line["step"], loss, many, mean, spread)
        return {"warning/loss_spike": 1}

    def _collapse(self, line: dict[str, float]) -> dict[str, int]:
        tokens = {name: line[f"tokens_per_expert/{name}"] for name in self.experts if f"tokens_per_expert/{name}" in line}
        even = sum(tokens.values()) / max(len(tokens), 1)
        begun = {}
        for name, taken in tokens.items():
            idle = taken < self.guards.collapse_share * even
            self.idle_steps[name] = self.idle_steps[name] + 1 if idle else 0
            if self.idle_steps[name] == self.guards.collapse_steps:
                self._say(line["step"], name, taken / even)
                begun[f"warning/expert_collapse/{name}"] = 1
        return begun

    def _say(self, step: float, name: str, share: float) -> None:
        if self.experts[name] is None:
            remark = "a general expert may be unused: no loss asks for it"
        else:
            remark = "a higher router.loss_weight, or router.balance_weight, may help"
        logger.warning(
            "step %d: expert '%s' has had less than %g of an even share of the tokens for %d steps (now %.2g; %s)",
            step, name, self.guards.collapse_share, self.guards.collapse_steps, share, remark,
        )  # fmt: skip
