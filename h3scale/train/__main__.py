"""One rank of a training run: `python -m h3scale.train RECIPE [key=value ...]`, started by any launcher."""

import os
import sys
import time
import traceback
from contextlib import suppress
from typing import Any

from h3scale import log
from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.config.tiny import TINY
from h3scale.errors import H3Error, PeerLostError, StoppedError, TakenError, UsageError
from h3scale.exit_status import BEGUN, ended_before, kept_step, read_exit_status, run_folder_of, write_exit_status

OPTIONS = {"--force": "force", "--from-scratch": "from_scratch", "--allow-change": "allow_change"}
USAGE = f"usage: python -m h3scale.train RECIPE [key=value ...] [{'] ['.join(OPTIONS)}] [--debug]"


def main(arguments: list[str]) -> int:
    """Exit code of the rank; errors for people as one line a finding, printed by one rank."""
    log.setup()
    # the deepspeed launcher adds --local_rank=N; LOCAL_RANK says the same
    words = [a for a in arguments if not a.startswith("--local_rank")]
    options = {a for a in words if a.startswith("--")}
    recipe: TrainRecipe | None = None
    stale: dict[str, Any] | None = None
    try:
        given = [a for a in words if not a.startswith("--")]
        if not given or options - {*OPTIONS, "--debug"}:
            raise UsageError(USAGE)
        recipe = _recipe(given[0], given[1:])
        if ended_before(recipe.out):
            if log.RANK == 0:
                print(f"result: {recipe.out} (complete since an earlier start of this job)")
            return 0
        stale = read_exit_status(recipe.out)
        from h3scale.train.loop import Options, train

        out = train(recipe, given[0], Options(**{name: option in options for option, name in OPTIONS.items()}))
    except Exception as error:
        return _failed(error, recipe, stale, "--debug" in options)
    _leave()
    if log.RANK == 0:
        print(f"result: {out}")
        if (out / "manifest.json").is_file():
            print(f"next:   h3scale checkpoint consolidate {out} models/NAME")
        else:
            print(f"next:   h3scale evaluate {out} --records FILE.jsonl --out FILE.json")
    return 0


def _failed(error: Exception, recipe: TrainRecipe | None, stale: dict[str, Any] | None, debug: bool) -> int:
    """Says what ended the run, to people and in its folder (`stale`: what that said before); the exit code."""
    if isinstance(error, StoppedError):
        if log.RANK == 0:
            print(f"stopped: {error}")
        return error.exit_code
    if isinstance(error, H3Error):
        if log.RANK:
            time.sleep(3)  # rank 0 says the same; this rank speaks only if rank 0 is still alive then
        if debug:
            traceback.print_exc()
        for finding in error.findings:
            print(f"error: {finding}", file=sys.stderr)
        if isinstance(error, TakenError):
            return error.exit_code  # the folder is another run's, which says there how it ends
        return _told(recipe, stale, error.exit_code, error.findings[0])
    if _peer_lost(error):
        reason = f"rank {log.RANK}: {_who(error, recipe)} ({str(error).splitlines()[0]})"
        print(f"error: {reason}", file=sys.stderr)
        return _told(recipe, stale, PeerLostError.exit_code, reason)
    traceback.print_exc()  # our bug: the traceback, and the exit code that says so
    return _told(recipe, stale, 70, f"rank {log.RANK}: {type(error).__name__}: {error}")


def _told(recipe: TrainRecipe | None, stale: dict[str, Any] | None, exit_code: int, reason: str) -> int:
    """The exit code, written down where the run has a folder: launchers lose it. That a peer was lost is said last."""
    if recipe and run_folder_of(recipe.out).is_dir():
        before = read_exit_status(recipe.out)
        if (
            before is None
            or before == stale
            or before["reason"] == BEGUN
            or before["exit_code"] == PeerLostError.exit_code != exit_code
        ):
            with suppress(OSError):  # the disk may be why
                write_exit_status(run_folder_of(recipe.out), exit_code, reason, kept_step(recipe.out), recipe.steps)
    return exit_code


def _peer_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or late: NCCL says so by type, gloo by its words."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _who(error: Exception, recipe: TrainRecipe | None) -> str:
    """Who does not answer."""
    from h3scale.train.peers import missing_ranks

    log_file = run_folder_of(recipe.out if recipe else "") / "logs" / f"rank-{log.RANK}.log"
    missing = missing_ranks("timed out" in str(error).lower() or "timeout" in str(error).lower(), log_file)
    if not missing:
        return "the other ranks do not answer"
    return f"rank {missing[0]} does not answer" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} do not answer"


def _recipe(path: str, overrides: list[str]) -> TrainRecipe:
    recipe = load_recipe(TrainRecipe, path, overrides)
    if TINY in overrides:
        from h3scale.model.tiny import make_models

        make_models(recipe)
    return recipe


def _leave() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DeepSpeed's exit handlers take seconds and print; everything is on disk by now
