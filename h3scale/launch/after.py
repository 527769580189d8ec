"""What becomes of a Slurm job when its ranks have ended: `python -m h3scale.launch.after --code N RECIPE [key=value ...]`.

slurm/train.sh asks. One line on stdout for it, `requeue CODE` or `end CODE`, and one on stderr for people.
"""

import json
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h3scale.config.base import load_recipe
from h3scale.config.recipe import TrainRecipe
from h3scale.errors import H3Error, PeerLostError, StoppedError, UsageError
from h3scale.exit_status import kept_step, read_exit_status, run_folder_of, this_attempt

COMES_BACK = (StoppedError.exit_code, PeerLostError.exit_code)
MAX_RESTARTS = 3  # without a new step: what has failed so often is no accident
USAGE = "usage: python -m h3scale.launch.after --code N RECIPE [key=value ...]"


@dataclass(frozen=True)
class Verdict:
    """Whether Slurm shall start the job again, the exit code it has otherwise, and why."""

    requeue: bool
    code: int
    line: str


def judge(out: Path, srun_code: int) -> Verdict:
    """What becomes of the job whose run writes `out`. Counts restarts without a new step beside the run.

    The run's own exit_status.json decides, if it is of this job and this start; else srun's code, of which one above 128
    (a rank that was killed, a node that is gone) counts as a lost peer.
    """
    counter = run_folder_of(out).with_name(f"{run_folder_of(out).name}.restarts")
    code, what = _how_it_ended(out, srun_code)
    if code not in COMES_BACK:
        counter.unlink(missing_ok=True)
        return Verdict(False, code, f"{out}: {what} (exit code {code})")
    job, step = this_attempt()["job"], kept_step(out)
    place = f"goes on at step {step}" if step else "begins anew, as no step was saved"
    restarts = _restarts_at(counter, job, step)
    if restarts >= MAX_RESTARTS:
        counter.unlink(missing_ok=True)
        told = f"not requeued, as {restarts} restarts have brought no new step (works: read the logs; the same command {place})"
        return Verdict(False, code, f"{out}: {what} (exit code {code}): {told}")
    _write(counter, {"job": job, "step": step, "restarts": restarts + 1})
    return Verdict(True, code, f"{out}: {what} (exit code {code}): requeued, {place}")


def _how_it_ended(out: Path, srun_code: int) -> tuple[int, str]:
    status = read_exit_status(out)
    if status is not None:
        return status["exit_code"], f"{status['reason']}, step {status['step']} of {status['steps']}"
    if srun_code > 128:
        return PeerLostError.exit_code, f"srun ended with {srun_code}: a rank was killed or a node is gone"
    return srun_code, "done" if srun_code == 0 else f"srun ended with {srun_code}"


def _restarts_at(counter: Path, job: str | None, step: int) -> int:
    """How often this job has been restarted from this step; 0 of a file that is not there or not whole."""
    try:
        before = json.loads(counter.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return int(before["restarts"]) if before["job"] == job and before["step"] == step else 0


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Always 0 with a verdict; errors for people otherwise."""
    try:
        if len(arguments) < 3 or arguments[0] != "--code" or not arguments[1].isdigit():
            raise UsageError(USAGE)
        given = [word for word in arguments[2:] if not word.startswith("--")]
        recipe = load_recipe(TrainRecipe, given[0], given[1:])
        verdict = judge(Path(recipe.out), int(arguments[1]))
    except H3Error as error:
        for finding in error.findings:
            print(f"error: {finding}", file=sys.stderr)
        return error.exit_code
    print(verdict.line, file=sys.stderr)
    print("requeue" if verdict.requeue else "end", verdict.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
