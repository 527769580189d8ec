"""A row of h3scale commands: printed before they run, each run once, stopped at the first that fails."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from h3scale.errors import H3Error


@dataclass(frozen=True)
class Step:
    """A command and why it is there. `command` is what a person would type; `makes` is what it leaves, if a path."""

    why: str
    command: list[str]
    makes: str | None = None


@dataclass
class Runner:
    """Runs steps in `folder`; a step whose result is there already is not run again."""

    folder: Path
    console: Console = field(default_factory=lambda: Console(highlight=False))
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, steps: list[Step], after: Callable[[Step], None] | None = None) -> None:
        """Raises the failed command's exit code as an H3Error; what is finished stays."""
        self.console.print(f"[dim]$ cd {shlex.quote(str(self.folder))}[/]")
        for number, step in enumerate(steps, start=1):
            self.console.print(f"\n[bold]{number}/{len(steps)}  {step.why}[/]\n[cyan]$ {shlex.join(step.command)}[/]")
            if step.makes and (self.folder / step.makes).exists():
                self.console.print(f"[dim]there already: {step.makes}[/]")
                continue
            began = time.monotonic()
            code = subprocess.run(executable(step.command), cwd=self.folder, check=False).returncode
            took = self.seconds[shlex.join(step.command)] = time.monotonic() - began
            if code:
                failure = H3Error(f"step {number} ended with exit code {code}: {shlex.join(step.command)}")
                failure.exit_code = code
                raise failure
            self.console.print(f"[dim]{took:.0f} s[/]")


def executable(command: list[str]) -> list[str]:
    """The command with this environment's own programs, whatever PATH says."""
    beside = Path(sys.executable).parent / command[0]
    return [str(beside) if beside.is_file() else command[0], *command[1:]]
