"""The nodes of a job find each other once: each says what it has seen, node 0 judges, all hear the verdict. Sockets alone."""

import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from h3scale.errors import PeerLostError

LIMIT_S = 60.0  # nodes of one job start within seconds; slow file systems and full machines take their time
CALL_S = 5.0  # one attempt to reach the first node


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet. `nodes` are their names, `index` is this one's place among them; node 0 listens.

    `key` is of this start of this job alone: another one on the same machine may have the same port.
    """

    nodes: tuple[str, ...]
    index: int
    host: str
    port: int
    key: str
    limit_s: float = LIMIT_S

    @property
    def place(self) -> str:
        return f"{self.nodes[0]} ({self.host}:{self.port})"


Judge = Callable[[list[dict[str, Any]]], dict[str, Any]]


def meet(meeting: Meeting, facts: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    """What `judge` gives on node 0 for the facts of all nodes, on every node. PeerLostError (69) names who does not answer."""
    if meeting.index == 0:
        return _listen(meeting, facts, judge)
    return _call(meeting, facts)


def _listen(meeting: Meeting, facts: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    deadline = time.monotonic() + meeting.limit_s
    told: dict[int, dict[str, Any]] = {0: dict(facts)}
    with ExitStack() as stack:
        door = stack.enter_context(_open_door(meeting))
        callers = []
        while len(told) < len(meeting.nodes):
            door.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                caller = stack.enter_context(door.accept()[0])
                caller.settimeout(CALL_S)
                index, theirs = _known(meeting, _receive(caller))
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # somebody who called and said nothing
                missing = [name for index, name in enumerate(meeting.nodes) if index not in told]
                raise PeerLostError(
                    f"{', '.join(missing)}: did not call {meeting.place} within {meeting.limit_s:.0f} s "
                    "(works: a network on which the nodes reach each other, or a job without that node: --exclude)"
                ) from None
            except (OSError, ValueError):
                continue  # not one of ours
            told[index] = theirs
            callers.append(caller)
        verdict = judge([told[index] for index in range(len(meeting.nodes))])
        for caller in callers:
            caller.sendall(json.dumps(verdict).encode() + b"\n")
    return verdict


def _open_door(meeting: Meeting) -> socket.socket:
    try:
        # every interface: which one the address of the job is on is Slurm's to know
        return socket.create_server(("", meeting.port), backlog=len(meeting.nodes))
    except OSError as error:
        raise PeerLostError(
            f"{meeting.nodes[0]}: port {meeting.port}: {error.strerror} (another program has it; a restart takes another port)"
        ) from None


def _call(meeting: Meeting, facts: Mapping[str, Any]) -> dict[str, Any]:
    deadline, own = time.monotonic() + meeting.limit_s, meeting.nodes[meeting.index]
    while True:
        try:
            with socket.create_connection((meeting.host, meeting.port), timeout=CALL_S) as line:
                line.sendall(json.dumps([meeting.key, meeting.index, facts]).encode() + b"\n")
                line.settimeout(meeting.limit_s)  # until the last node has called
                verdict = _receive(line)
                assert isinstance(verdict, dict)
                return verdict
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                why = getattr(error, "strerror", None) or str(error) or "no answer"
                raise PeerLostError(
                    f"{own}: {meeting.place} does not answer ({why}; works: a network on which the nodes reach each other)"
                ) from None
            time.sleep(0.2)


def _known(meeting: Meeting, words: Any) -> tuple[int, dict[str, Any]]:
    """A node's place and facts; ValueError for the words of anybody else."""
    match words:
        case [meeting.key, int(index), dict(facts)] if index in range(1, len(meeting.nodes)):
            return index, facts
    raise ValueError(f"not a node of this job: {words}")


def _receive(line: socket.socket) -> Any:
    with line.makefile("r", encoding="utf-8") as words:
        return json.loads(words.readline())
