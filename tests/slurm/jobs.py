"""Jobs of a test: submitted, watched, ended."""

from pathlib import Path

from tests.slurm.cluster import Cluster, wait_for

SCRIPTS = Path(__file__).parents[2] / "slurm"


class Jobs:
    """What one test submits in its folder."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.numbers: list[str] = []

    def submit(self, *words: object) -> str:
        """The job's number."""
        number = self.cluster.call("sbatch", "--parsable", *words, cwd=self.folder).stdout.strip()
        self.numbers.append(number)
        return number

    def train(self, *words: object, options: tuple[object, ...] = (), nodes: int = 2) -> str:
        """`sbatch slurm/train.sh` with one rank a node."""
        return self.submit(f"--nodes={nodes}", "--ntasks-per-node=1", *options, SCRIPTS / "train.sh", *words)

    def nodes(self, number: str) -> list[str]:
        return self.cluster.call("scontrol", "show", "hostnames", self.cluster.job(number)["NodeList"]).stdout.split()

    def log(self, number: str) -> str:
        """What the job's script has said."""
        path = self.folder / f"h3scale-{number}.log"
        return path.read_text() if path.exists() else ""

    def ranks_log(self, number: str, rank: int = 0) -> str:
        path = self.folder / f"h3scale-{number}" / f"rank-{rank}.log"
        return path.read_text() if path.exists() else ""

    def all_said(self, number: str) -> str:
        """For the message of a test that fails."""
        return f"{self.log(number)}\n--- rank 0\n{self.ranks_log(number)}\n--- rank 1\n{self.ranks_log(number, 1)}"

    def ended(self, number: str, limit_s: float = 300.0) -> dict[str, str]:
        """What Slurm says of the job when it has ended."""
        return self.cluster.wait_for_state(number, limit_s=limit_s)

    def end(self) -> None:
        for number in self.numbers:
            self.cluster.call("scancel", number, check=False)
        wait_for("an empty queue", lambda: not self.cluster.call("squeue", "--noheader").stdout.strip())
