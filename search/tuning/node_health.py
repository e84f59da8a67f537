"""Which nodes of a cluster are to blame for failures; trials are run on others."""

from collections.abc import Callable, Mapping

import ray

# So many trials have to fail on a node and get on elsewhere before it is left alone.
MOST_BLAMED = 2


def running_nodes() -> dict[str, str]:
    """Return the id of each node that runs trials now, by address; empty without a cluster."""
    if not ray.is_initialized():
        return {}
    return {
        node["NodeManagerAddress"]: node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0
    }


class NodeHealth:
    """Whether trials fail by themselves or by their nodes: what fails elsewhere too is the trial's.

    A node that is started anew is another one.

    Args:
        nodes: Returns the nodes as ``running_nodes`` does.
    """

    def __init__(self, nodes: Callable[[], Mapping[str, str]] = running_nodes) -> None:
        self._nodes = nodes
        # By trial, where it has failed since its last report.
        self._failed: dict[int, set[str]] = {}
        # By node, the trials that failed there and then got on elsewhere.
        self._blamed: dict[str, set[int]] = {}
        self._bad: set[str] = set()
        self._addresses: dict[str, str] = {}

    def is_alone(self, address: str) -> bool:
        """Tell whether trials could run nowhere else."""
        return not {node for other, node in self._nodes().items() if other != address} - self._bad

    def note_failure(self, address: str, number: int) -> bool:
        """Note that a trial failed there; tell whether it is to be tried elsewhere."""
        node = self._nodes().get(address)
        if node is None:
            return False
        self._addresses[node] = address
        is_first = not self._failed.get(number)
        self._failed.setdefault(number, set()).add(node)
        return is_first and not self.is_alone(address)

    def note_report(self, number: int) -> list[str]:
        """Note that a trial got on; return the addresses of nodes that are now left alone."""
        given_up = []
        for node in self._failed.pop(number, ()):
            blamed = self._blamed.setdefault(node, set())
            blamed.add(number)
            address = self._addresses[node]
            if len(blamed) == MOST_BLAMED and not self.is_alone(address):
                self._bad.add(node)
                given_up.append(address)
        return given_up

    def avoided_by(self, number: int) -> list[str]:
        """Return the ids of the nodes to keep a trial from; none if no other is there."""
        there = set(self._nodes().values()) if self._bad or number in self._failed else set()
        for avoided in (self._bad | self._failed.get(number, set()), self._bad):
            if there - avoided:
                return sorted(avoided)
        return []
