"""What nodes tell each other before the ranks: who does not answer, who differs, who has no room."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from h3scale.errors import H3Error, PeerLostError
from h3scale.launch.local import free_port
from h3scale.launch.preflight import judge, look
from h3scale.launch.rendezvous import Meeting, meet
from h3scale.versions import versions

NODES = ("n0", "n1", "n2")
GOOD = {"versions": {"torch": "2"}, "recipe": {"steps": 4}, "place": "/o", "key": "k", "free": 9, "needed": 5, "writable": True}


def told(**other: Any) -> list[dict[str, Any]]:
    """Facts of three nodes; those of n1 differ."""
    return [dict(GOOD), GOOD | other, dict(GOOD)]


def together(nodes: tuple[str, ...], present: int, limit_s: float) -> dict[str, Any]:
    """What each node's meeting ended with, by name: the verdict (all names that were told), or the error."""
    port, ends = free_port(), {}

    def one(index: int) -> None:
        meeting = Meeting(nodes, index, "127.0.0.1", port, "17-0", limit_s)
        try:
            ends[nodes[index]] = meet(meeting, {"name": nodes[index]}, lambda facts: {"all": [fact["name"] for fact in facts]})
        except H3Error as error:
            ends[nodes[index]] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in reversed(range(present))]  # the first one comes last
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_every_node_hears_what_was_judged_of_all() -> None:
    assert together(NODES, 3, 30) == {name: {"all": list(NODES)} for name in NODES}


def test_a_node_that_does_not_come_is_named() -> None:
    error = together(NODES, 2, 1.0)["n0"]
    assert isinstance(error, PeerLostError)
    assert str(error).startswith("n2: did not call n0 (127.0.0.1:")


def test_a_node_of_another_job_is_not_taken_for_one_of_this() -> None:
    port = free_port()
    ends: list[object] = []

    def listen() -> None:
        try:
            meet(Meeting(("n0", "n1"), 0, "127.0.0.1", port, "17-0", 2.0), {}, lambda facts: {})
        except PeerLostError as error:
            ends.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    with pytest.raises(PeerLostError):
        meet(Meeting(("m0", "m1"), 1, "127.0.0.1", port, "18-0", 1.0), {}, lambda facts: {})
    thread.join()
    assert len(ends) == 1


def test_a_first_node_that_does_not_answer_is_named_with_host_and_port() -> None:
    with pytest.raises(PeerLostError, match=r"^n1: n0 \(127.0.0.1:1\) does not answer \(Connection refused"):
        meet(Meeting(NODES, 1, "127.0.0.1", 1, "17-0", 0.5), {}, lambda facts: {})


def test_a_port_that_somebody_has_is_named() -> None:
    with socket.create_server(("", 0)) as other, pytest.raises(PeerLostError, match=r"^n0: port \d+: Address already in use"):
        meet(Meeting(NODES, 0, "127.0.0.1", other.getsockname()[1], "17-0", 0.5), {}, lambda facts: {})


@pytest.mark.parametrize(
    ("other", "code", "line"),
    [
        ({"versions": {"torch": "3"}}, 78, "n1: versions: torch is 3, on n0 2 (works: the same environment on all nodes)"),
        ({"recipe": {"steps": 5}}, 78, "n1: recipe: steps is 5, on n0 4 (works: the same files on all nodes)"),
        ({"key": None}, 73, "n1: /o: is not the folder that n0 writes (works: a shared file system)"),
        ({"writable": False}, 73, "n1: /o: is not writable"),
        ({"free": 4}, 73, "n1: /o: 0.0 GB free, the model alone is 0.0 GB (works: another out)"),
        ({"error": ["r.yaml: no such file"], "code": 66}, 66, "n1: r.yaml: no such file"),
    ],
)
def test_a_node_that_differs_is_named_with_what_differs(other: dict[str, Any], code: int, line: str) -> None:
    assert judge(NODES, told(**other)) == {"code": code, "findings": [line]}


def test_nodes_that_agree_have_no_findings() -> None:
    assert judge(NODES, told()) == {"code": 0, "findings": []}


def test_what_all_nodes_find_is_said_once() -> None:
    wrong = {"versions": {}, "error": ["r.yaml: no such file"], "code": 66}
    assert judge(NODES, [wrong, wrong, wrong]) == {"code": 66, "findings": ["r.yaml: no such file"]}


def test_nodes_of_one_machine_see_the_same(tmp_path: Path) -> None:
    words = ["recipes/demo/base.yaml", f"out={tmp_path / 'models' / 'base'}"]
    seen = [look(words, Meeting(("n0", "n1"), index, "", 0, "17-0"))[0] for index in (0, 1)]
    assert judge(("n0", "n1"), seen) == {"code": 0, "findings": []}
    assert seen[0]["versions"].keys() == {"python", "torch", "deepspeed", "transformers", "h3scale"}
    assert "missing" not in versions().values()


def test_a_node_with_fewer_gpus_than_tasks_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from h3scale.launch import collective

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    assert collective.main(0, 8, ["n0"]) == 78
    assert capsys.readouterr().err.startswith("error: n0: 4 GPUs for 8 tasks (works: --gpus-per-node=8")
