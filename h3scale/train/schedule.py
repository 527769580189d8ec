"""The learning rate of a step, as a pure function."""

import math

from h3scale.config.recipe import Optimizer


def learning_rate_share(step: int, steps: int, recipe: Optimizer) -> float:
    """The share of the peak learning rate for optimizer step `step` (0 to steps - 1).

    Linear warm-up over `warmup_share` of the steps (its first step is above 0), then down to `final_share`.
    """
    warmup = round(recipe.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    begin = max(warmup, round((1 - recipe.decay_share) * steps)) if recipe.schedule == "wsd" else warmup
    done = max(0, step - begin) / max(1, steps - begin)
    falling = 0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done
    return recipe.final_share + (1 - recipe.final_share) * falling
