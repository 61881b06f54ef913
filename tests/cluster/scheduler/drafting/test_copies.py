"""Tests of drafts that continue a copy behind a difference."""

from __future__ import annotations

import random

import pytest

from llamaclust.cluster.scheduler.drafting.copies import MOST_DIFFERENT
from llamaclust.cluster.scheduler.drafting.drafter import MIDDLE, NO_DRAFT, RESUMED, SHORT, SINGLE, SUBSTITUTED, Draft
from llamaclust.cluster.scheduler.drafting.ngram import NgramDrafter
from support.seed import SEED

SOURCE = [*range(1000, 1100)]


def behind(copied: int, added: list[int], resumed: list[int], source: list[int] = SOURCE) -> Draft:
    """Returns the last draft, of at most four tokens, behind a copied beginning of the source, added tokens and resumed
    ones; a draft is made at each of the latter two."""
    drafter, tokens = NgramDrafter(), [*source, 1, *source[:copied]]
    draft = drafter.draft(tokens, 4)
    for token in (*added, *resumed):
        tokens.append(token)
        draft = drafter.draft(tokens, 4)
    return draft


@pytest.mark.parametrize("seed", range(SEED, SEED + 50))
def test_a_copy_goes_on_behind_tokens_that_are_replaced_left_out_or_added(seed: int) -> None:
    draw = random.Random(seed)
    copied, skipped, added = draw.randint(8, 40), draw.randint(0, 14), draw.randint(0, MOST_DIFFERENT - 1)
    start = copied + skipped + (not skipped and not added)
    draft = behind(copied, [draw.randrange(10, 900) for _ in range(added)], SOURCE[start : start + 1])
    assert draft == Draft(tuple(SOURCE[start + 1 : start + 5]), RESUMED)


def test_several_tokens_say_more_than_one() -> None:
    assert behind(10, [5], SOURCE[11:13]) == Draft(tuple(SOURCE[13:17]), RESUMED + 1)
    source = [*range(1000, 1010), 7, 1, 7, 2, 7, 3, *range(1020, 1040)]
    assert behind(10, [90, 91], [7], source) == Draft((2, 7, 3, 1020), RESUMED), "as many left out as added"
    assert behind(10, [90], [1, 7], source) == Draft((2, 7, 3, 1020), RESUMED + 1)


def test_a_place_near_the_copy_is_better_than_a_newer_one() -> None:
    tokens = [*SOURCE, 1012, 1013, 5, *SOURCE[:10]]
    drafter = NgramDrafter()
    drafter.draft(tokens, 4)
    assert drafter.draft([*tokens, 6, 1012], 4).tokens == (1013, 1014, 1015, 1016)
    assert drafter.draft([*tokens, 6, 1012, 1013], 4) == Draft((1014, 1015, 1016, 1017), RESUMED + 1)
    fresh = NgramDrafter()
    assert fresh.draft([*tokens, 6, 1012, 1013], 4).tokens[0] == 5


def test_a_copy_that_was_accepted_goes_on_where_it_ended() -> None:
    drafter, tokens = NgramDrafter(), [*SOURCE, 1, *SOURCE[:10]]
    drafter.draft(tokens, 128)
    tokens += [*SOURCE[10:60], 5, 6, 1063]  # no draft in between
    assert drafter.draft(tokens, 2) == Draft((1064, 1065), RESUMED)


def test_places_that_are_far_or_too_late_are_none() -> None:
    late = behind(10, [*range(MOST_DIFFERENT)], [1012])
    assert late == Draft((1013, 1014, 1015, 1016), SINGLE + 1)
    assert behind(10, [5], [1090]).confidence == SINGLE + 1
    assert behind(7, [5], [1008]).confidence == SINGLE + 1, "seven tokens are no copy"
    assert behind(10, [5], [6]) == NO_DRAFT


def test_long_matches_elsewhere_are_better() -> None:
    tokens = [*SOURCE, 50, 51, 1012, 1099, 98, 1, *SOURCE[:10]]
    drafter = NgramDrafter()
    drafter.draft(tokens, 4)
    assert drafter.draft([*tokens, 50, 51, 1012], 1) == Draft((1099,), SHORT + 1), "three tokens beside one"
    tokens = [*SOURCE, *SOURCE[12:16], 99, 1, *SOURCE[:10]]
    drafter = NgramDrafter()
    drafter.draft(tokens, 4)
    assert drafter.draft([*tokens, 5, *SOURCE[12:16]], 1) == Draft((99,), MIDDLE), "four tokens are sure"


def test_behind_a_single_other_token_a_copy_goes_on_whatever_followed_that_elsewhere() -> None:
    tokens = [*SOURCE, 50, 7, 60, 51, 7, 60, 52, *SOURCE[:10]]
    drafter = NgramDrafter()
    drafter.draft(tokens, 4)
    assert drafter.draft([*tokens, 7], 2) == Draft((1011, 1012), SUBSTITUTED)
    assert drafter.draft([*tokens, 7, 51], 2) == Draft((7, 60), SINGLE + 1), "but only behind one"
