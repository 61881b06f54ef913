"""Tests of terms, which are kept per cluster, since several clusters with separate terms may share a token."""

from __future__ import annotations

import pytest

from llamaclust.core.errors import WorkerError
from llamaclust.wire.security.terms import TermProof
from llamaclust.worker import seen_terms
from llamaclust.worker.seen_terms import ClusterKey, SeenTerms

ALPHA, BETA, OTHER_CA = ClusterKey("ca", "alpha"), ClusterKey("ca", "beta"), ClusterKey("another", "alpha")
NONE = TermProof()


@pytest.mark.parametrize("another", [BETA, OTHER_CA, ClusterKey("", "alpha")])
def test_only_the_awaited_cluster_admits_the_worker(another: ClusterKey) -> None:
    terms = SeenTerms()
    terms.enter(ALPHA, 5, NONE)
    with pytest.raises(WorkerError, match="expected a coordinator of cluster 'alpha'"):
        terms.enter(another, 9, NONE)
    terms.enter(ALPHA, 6, NONE)
    terms.give_up()
    terms.enter(another, 2, NONE)
    assert (terms.last, terms.largest.value) == (another, 2)


@pytest.mark.parametrize("between", [[], [BETA], [BETA, OTHER_CA]], ids=len)
def test_a_superseded_coordinator_is_refused_after_the_worker_gave_up(between: list[ClusterKey]) -> None:
    terms, proof = SeenTerms(), TermProof(b"certificate", b"signed")
    terms.enter(ALPHA, 5, proof)
    for cluster in between:
        terms.give_up()
        terms.enter(cluster, 1, NONE)
    terms.give_up()
    with pytest.raises(WorkerError, match=r"term 4 is superseded: this worker has seen a newer one \(term 5\)"):
        terms.enter(ALPHA, 4, NONE)
    assert (terms.last, terms.largest.value, terms.largest.proof) == (ALPHA, 5, proof), "the next attempt proves it"
    assert not terms.is_awaited


def test_an_ended_cluster_counts_its_terms_anew() -> None:
    terms = SeenTerms()
    terms.enter(ALPHA, 5, NONE)
    terms.end()
    terms.enter(ALPHA, 1, NONE)
    assert terms.largest.value == 1


def test_the_newest_clusters_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_terms, "_MOST_CLUSTERS", 3)
    terms = SeenTerms()
    for number in range(5):
        terms.enter(ClusterKey("ca", str(number)), 7, NONE)
        terms.give_up()
    with pytest.raises(WorkerError, match="superseded"):
        terms.enter(ClusterKey("ca", "2"), 6, NONE)
    terms.enter(ClusterKey("ca", "0"), 6, NONE)
