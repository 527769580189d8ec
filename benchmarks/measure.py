"""What every benchmark needs: interleaved timings, memory of a process tree, the machine, and a table of the result."""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")
POLL_S = 0.02
NOT_MEASURING = (":(exclude)benchmarks/results", ":(exclude)benchmarks/README.md")  # what a run and its tables write
Row = dict[str, Any]


@dataclass
class Timing:
    """Seconds of each round; CPU time counts all threads, and the processes that were started and have ended."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def best(self, clock: str = "cpu_s") -> float:
        return min(getattr(self, clock))

    def median(self, clock: str = "cpu_s") -> float:
        return statistics.median(getattr(self, clock))

    def figures(self) -> Row:
        return {
            "rounds": len(self.cpu_s),
            "cpu_s_min": self.best(),
            "cpu_s_median": self.median(),
            "wall_s_min": self.best("wall_s"),
            "wall_s_median": self.median("wall_s"),
        }


def interleaved(
    works: Mapping[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[], Any] = lambda: None,
    failed: Callable[[str, Exception], Any] | None = None,
) -> dict[str, Timing]:
    """Times all works A, B, A, B, ...: what else the machine does meanwhile falls on all alike. `before` is not timed.

    `failed` is told of a work's exception, and the others go on without it; unless it raises. Without `failed` all end with it.
    """
    timings = {name: Timing() for name in works}
    for _ in range(rounds):
        for name in list(timings):
            before()
            wall, cpu = time.perf_counter(), cpu_s()
            try:
                works[name]()
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del timings[name]
                continue
            timings[name].cpu_s.append(cpu_s() - cpu)
            timings[name].wall_s.append(time.perf_counter() - wall)
    return timings


def said(error: Exception) -> str:
    """A line about it, for the row of what was not run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def cpu_s() -> float:
    """CPU seconds of this process so far, and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_memory(command: list[str], environment: Mapping[str, str]) -> tuple[str, Row]:
    """Runs a command; gives what it printed, and the peaks of its own memory and of its largest child process, in MiB.

    anon: memory of its own. rss: with the pages of mapped files, which the system takes back when it needs them.
    """
    peaks = {f"{who}_{what}_mib": 0.0 for who in ("parent", "worker") for what in ("anon", "rss")}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(POLL_S):
            for pid in (child.pid, *_children(child.pid)):
                anon, rss = _memory_mib(pid)
                who = "parent" if pid == child.pid else "worker"
                peaks[f"{who}_anon_mib"] = max(peaks[f"{who}_anon_mib"], anon)
                peaks[f"{who}_rss_mib"] = max(peaks[f"{who}_rss_mib"], rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    said, _ = child.communicate()
    ended.set()
    sampler.join()
    if child.returncode:
        raise RuntimeError(f"{Path(command[1]).name} {command[2]}: exit {child.returncode}")
    return said, peaks


def own_memory_mib() -> tuple[float, float]:
    """(anonymous, all) resident memory of this process."""
    return _memory_mib(os.getpid())


def _memory_mib(pid: int) -> tuple[float, float]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has just ended
        return 0.0, 0.0
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return float(values.get("RssAnon", 0)) / 1024, float(values.get("VmRSS", 0)) / 1024


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def machine() -> Row:
    """No names and no paths: what decides a speed."""
    flags: set[str] = set()
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
        if name.strip() == "model name":
            model = value.strip()
    return {
        "cpu": model,
        "isa": [name for name in ISA if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def versions(packages: Iterable[str]) -> Row:
    """None for a package that is not installed. `h3scale` is the commit, with + when h3scale/ or benchmarks/ differ from it."""
    found: Row = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "h3scale": _commit()}


def _commit() -> str:
    """With + where what is measured, or what measures it, differs. A copy without git is told by BENCHMARK_COMMIT what it is of."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "HEAD")
    if not commit:
        return os.environ.get("BENCHMARK_COMMIT", "unknown")
    return commit + ("+" if git("status", "--porcelain", "--", "h3scale", "benchmarks", *NOT_MEASURING) else "")


def run_subjects(
    script: str, words: argparse.Namespace, packages: Iterable[str], subject: Callable[[str, Path], Any], device: Row | None = None
) -> None:
    """Runs each subject asked for in a folder of its own, which is deleted, prints its table, and writes the JSON asked for.

    `subject` gives rows, at once or one after another, or {"rows", "versions", ...}; `device`: what the machine has besides. The
    JSON is written after every row that comes: of a run that is ended, what it found is there, and "unfinished" says which.
    """
    result: Row = {"command": command_line(script, vars(words).values()), "machine": {**machine(), **(device or {})}}
    result |= {"versions": versions(packages), "subjects": {}}

    def keep(name: str, found: Row) -> None:
        result["subjects"][name] = found
        if words.out:
            write_result(words.out, result)

    for name in words.only:
        work = Path(tempfile.mkdtemp(prefix="h3scale-benchmark-", dir=getattr(words, "work", None)))
        began, load = time.perf_counter(), os.getloadavg()[0]
        try:
            found = subject(name, work)
            if not isinstance(found, dict):
                rows: list[Row] = []
                for row in found:
                    rows.append(row)
                    keep(name, {"unfinished": True, "rows": rows})
                found = {"rows": rows}
        finally:
            shutil.rmtree(work)
        about = {"seconds": time.perf_counter() - began, "load_before": load, "load_after": os.getloadavg()[0]}
        result["versions"] |= found.pop("versions", {})
        keep(name, {**about, **found})
        print_table(name, found["rows"], about)
    if words.out:
        print(f"\nwritten: {words.out}")


def command_line(script: str, given: Iterable[Any]) -> str:
    """As it was given, with only the names of the files among `given`: results are read on other machines."""
    words = ["python", f"benchmarks/{script}", *sys.argv[1:]]
    for path in given:
        words = [word.replace(str(path), path.name) for word in words] if isinstance(path, Path) else words
    return " ".join(words)


def write_result(path: Path, result: Row) -> None:
    """The JSON of what a run has found so far. A run that is killed meanwhile leaves the one before."""
    result["machine"]["load_average_at_end"] = machine()["load_average"]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def subjects_of(parser: argparse.ArgumentParser, subjects: Iterable[str], on_disk: bool = False) -> argparse.Namespace:
    """The command's words; `only` is the list of subjects that are asked for, `work` the disk that is measured."""
    known = list(subjects)
    if on_disk:
        parser.add_argument(
            "--work", type=Path, help="folder on the disk that is measured (default: the system's for temporary files)"
        )
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, to see that everything works")
    parser.add_argument("--only", default=",".join(known), help="subjects, by comma (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    words = parser.parse_args()
    words.only = words.only.split(",")
    wrong = [name for name in words.only if name not in known]
    if wrong:
        parser.error(f"--only: '{wrong[0]}' is no subject (works: {', '.join(known)})")
    return words


def print_table(title: str, rows: list[Row], about: Row) -> None:
    """A table with a column for every figure of any row; what was not run has its reason there."""
    print(f"\n{title}  ({', '.join(f'{key} {_cell(value)}' for key, value in about.items())})")
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "not_run"))
    lines = [columns]
    for row in rows:
        cells = [_cell(row.get(column, "")) for column in columns]
        lines.append(cells if "not_run" not in row else [*cells[:1], f"not run: {row['not_run']}"])
    widths = [max(len(line[i]) for line in lines if len(line) == len(columns)) for i in range(len(columns))]
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip())
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
