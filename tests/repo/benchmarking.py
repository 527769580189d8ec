"""How the tests of benchmarks run one: as people do, at toy size."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def benchmark(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def tiny_result(script: str, folder: Path, subjects: Iterable[str], *words: str) -> dict[str, Any]:
    out = folder / f"{script}.json"
    done = benchmark(script, "--tiny", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"\n{name}  (" in done.stdout for name in subjects)
    return json.loads(out.read_text())  # type: ignore[no-any-return]
