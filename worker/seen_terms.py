"""The largest coordinator term that this process has seen in each cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

from llamaclust.core.errors import WorkerError
from llamaclust.wire.security.terms import TermProof

_MOST_CLUSTERS = 64


@dataclass(frozen=True, slots=True)
class ClusterKey:
    authority: str  # Id of the cluster's certificate authority, or "" if the cluster is insecure.
    name: str


@dataclass(frozen=True, slots=True)
class SeenTerm:
    value: int = 0
    proof: TermProof = field(default_factory=TermProof)


@dataclass(slots=True)
class SeenTerms:
    last: ClusterKey = ClusterKey("", "")
    is_awaited: bool = False  # True if only a coordinator of `last` may admit the worker.
    _largest: dict[ClusterKey, SeenTerm] = field(default_factory=dict)

    @property
    def largest(self) -> SeenTerm:
        return self._largest.get(self.last, SeenTerm())

    def enter(self, cluster: ClusterKey, term: int, proof: TermProof) -> None:
        """Records an admission. Raises WorkerError if the coordinator is superseded or belongs to another cluster."""
        if self.is_awaited and cluster != self.last:
            raise WorkerError(f"expected a coordinator of cluster {self.last.name!r}, found one of {cluster.name!r}")
        # Set even if `see` raises, so that the next attempt can tell a superseded coordinator the term.
        self.last = cluster
        self.see(term, proof)
        self.is_awaited = True

    def see(self, term: int, proof: TermProof | None = None) -> None:
        """Records a term of the last cluster. Raises WorkerError if a larger term was seen before."""
        largest = self.largest
        if term < largest.value:
            seen = f"this worker has seen a newer one (term {largest.value})"
            raise WorkerError(f"the coordinator of term {term} is superseded: {seen}")
        if proof is not None or term > largest.value:
            self._largest.pop(self.last, None)  # Moves the cluster to the end, so that it is forgotten last.
            self._largest[self.last] = SeenTerm(term, proof or TermProof())
        while len(self._largest) > _MOST_CLUSTERS:
            del self._largest[next(iter(self._largest))]

    def give_up(self) -> None:
        """Lets a coordinator of any cluster admit the worker. Superseded coordinators are still refused."""
        self.is_awaited = False

    def end(self) -> None:
        """Forgets the terms of the last cluster, which has ended. A new cluster of that name may have smaller terms."""
        self.is_awaited = False
        self._largest.pop(self.last, None)
