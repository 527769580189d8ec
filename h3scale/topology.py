"""Ranks, expert-parallel groups and which rank holds which expert, as integer mathematics. No torch.

DeepSpeed's AutoEP lays the ranks out so that `ep_size` neighbours form one expert-parallel (EP) group; the ranks that
hold the same experts in different EP groups form an expert-data-parallel (EDP) group.
"""

from dataclasses import dataclass
from math import gcd

from h3scale.errors import ConfigError


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def best_ep_size(num_experts: int, ranks_per_node: int) -> int:
    """The largest EP size for these experts that stays within a node: all-to-all between nodes is what slows experts down."""
    return gcd(num_experts, ranks_per_node)


@dataclass(frozen=True)
class Topology:
    """`world_size` ranks in EP groups of `ep_size`, for `num_experts` experts a layer.

    Raises ConfigError (78) naming the sizes that work when `ep_size` does not divide both.
    """

    world_size: int
    ep_size: int
    num_experts: int

    def __post_init__(self) -> None:
        if self.ep_size >= 1 and self.world_size % self.ep_size == 0 and self.num_experts % self.ep_size == 0:
            return
        works = [d for d in divisors(self.num_experts) if self.world_size % d == 0]
        raise ConfigError(
            f"ep_size: {self.ep_size} must divide num_experts = {self.num_experts} and world_size = "
            f"{self.world_size} (works: {', '.join(map(str, works))})"
        )

    @property
    def edp_size(self) -> int:
        """How many ranks hold a copy of the same experts."""
        return self.world_size // self.ep_size

    @property
    def num_local_experts(self) -> int:
        """Experts a rank holds."""
        return self.num_experts // self.ep_size

    def ep_rank(self, rank: int) -> int:
        """The place of a rank in its EP group, 0 to ep_size - 1."""
        return rank % self.ep_size

    def local_experts(self, rank: int) -> range:
        """The experts that a rank holds."""
        first = self.ep_rank(rank) * self.num_local_experts
        return range(first, first + self.num_local_experts)
