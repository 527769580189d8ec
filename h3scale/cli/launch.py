"""h3scale launch."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from h3scale.cli.train import Overrides, RecipeArgument

Print = Annotated[bool, typer.Option("--print", help="Print the commands and start nothing (the default).")]
Submit = Annotated[bool, typer.Option("--submit", help="Submit the job to Slurm.")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Machines; 1 without.", show_default=False)]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus-per-node", min=1, help="GPUs of each, and ranks; without, the recipe's ranks.", show_default=False),
]
More = Annotated[list[str] | None, typer.Option("--sbatch", help="One more option of sbatch, such as --sbatch=--time=24:00:00.")]
Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", help="Write one for DeepSpeed's launcher over ssh, and print its command.")
]
Node = Annotated[
    list[str] | None, typer.Option("--node", help="A machine of the hostfile; may be given again. Default: the Slurm allocation's.")
]


def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    print_: Print = False,
    submit: Submit = False,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    sbatch: More = None,
    hostfile: Hostfile = None,
    node: Node = None,
) -> None:
    """Start a recipe on a cluster: print the commands, or submit the job.

    The job is slurm/train.sh, which can be submitted by hand as well (slurm/README.md).

    Example: h3scale launch recipes/llama31_8b/train_4_nodes.yaml --nodes 4 --gpus-per-node 8 --submit
    """
    from h3scale.errors import UsageError
    from h3scale.launch.slurm import deepspeed_command, hostfile_text, node_names, sbatch_command, sized
    from h3scale.launch.slurm import submit as to_slurm

    if submit and (print_ or hostfile):
        raise UsageError("--submit: excludes --print and --hostfile (works: one of them)")
    words = overrides or []
    names = node_names(node or []) if hostfile else []
    size = sized(recipe, words, len(names) or nodes, gpus_per_node)
    command = sbatch_command(recipe, words, size, sbatch or [])
    if submit:
        print(to_slurm(command))
    elif hostfile:
        hostfile.write_text(hostfile_text(names, size.tasks), encoding="utf-8")
        print(shlex.join(deepspeed_command(recipe, words, size, hostfile)))
    else:
        print(f"slurm:     {shlex.join(command)}")
        if size.nodes == 1:
            print(f"deepspeed: {shlex.join(deepspeed_command(recipe, words, size))}")
