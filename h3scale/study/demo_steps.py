"""A row of h3scale commands: printed before they run, each run once, stopped at the first that fails."""

import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from h3scale.errors import H3Error
from h3scale.study.tasks import executable


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

    def run(self, steps: list[Step]) -> None:
        """Raises the failed command's exit code as an H3Error; what is finished stays."""
        self._say(f"$ cd {shlex.quote(str(self.folder))}", "dim")
        for number, step in enumerate(steps, start=1):
            self._say(f"\n{number}/{len(steps)}  {step.why}", "bold")
            self._say(f"$ {shlex.join(step.command)}", "cyan")
            if step.makes and (self.folder / step.makes).exists():
                self._say(f"there already: {step.makes}", "dim")
                continue
            began = time.monotonic()
            code = subprocess.run(executable(step.command), cwd=self.folder, check=False).returncode
            took = time.monotonic() - began
            if code:
                failure = H3Error(f"step {number} ended with exit code {code}: {shlex.join(step.command)}")
                failure.exit_code = code
                raise failure
            self._say(f"{took:.0f} s", "dim")

    def _say(self, text: str, style: str) -> None:
        self.console.print(text, style=style, markup=False, soft_wrap=True)  # a command is to be copied as it is
