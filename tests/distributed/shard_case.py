"""What shard_models.py is to train, as text between the processes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One model to train and save."""

    name: str
    world_size: int
    stage: int
    ep_size: int
    num_experts: int
    precision: str
    options: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> "Case":
        name, world_size, stage, ep_size, num_experts, precision, *options = text.split(":")
        return cls(name, int(world_size), int(stage), int(ep_size), int(num_experts), precision, tuple(options))

    def __str__(self) -> str:
        *values, options = vars(self).values()
        return ":".join(map(str, (*values, *options)))
