"""Whatever arrives in whatever order, what a subscriber applies is a path of the true chain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.deltas import BASE_SHA256, IDENTITY, Made, chain, made
from support.manifests import RUN

from stream_ctr.snapshots import delta_chain
from stream_ctr.snapshots.delta import DeltaPosition, DeltaRank
from stream_ctr.snapshots.delta_chain import Apply, Chain, Gap, Judgement, Refused, Stale

OTHER_RUN = "f" * 32


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """What a chain needs to know of a published snapshot."""

    manifest_sha256: str
    position: DeltaPosition | None
    epoch: int
    examples: int


def begin(chain_: Chain, snapshot: Snapshot) -> None:
    chain_.begin(
        snapshot.manifest_sha256,
        snapshot.position,
        run=RUN,
        model="default",
        identity_sha256=IDENTITY,
        epoch=snapshot.epoch,
        examples=snapshot.examples,
    )


BASE_SNAPSHOT = Snapshot(BASE_SHA256, None, 3, 1000)


@pytest.fixture
def at_base() -> Chain:
    begun = Chain()
    begin(begun, BASE_SNAPSHOT)
    return begun


def judge(chain_: Chain, link: Made) -> Judgement:
    return chain_.judge(link.header, link.sha256)


def follow(chain_: Chain, *links: Made) -> list[type[Judgement]]:
    """Apply what may be applied; return the verdicts."""
    verdicts = []
    for link in links:
        verdict = judge(chain_, link)
        verdicts.append(type(verdict))
        if isinstance(verdict, Apply):
            chain_.applied(link.header, link.sha256)
    return verdicts


def test_a_chain_is_applied_from_its_base_on(at_base: Chain) -> None:
    links = chain(4)
    assert follow(at_base, *links) == [Apply] * 4
    assert at_base.rank == DeltaRank(3, 4)


def test_a_chain_goes_on_from_a_snapshot_in_its_middle() -> None:
    links = chain(4)
    begun = Chain()
    begin(begun, Snapshot(sha256("B"), links[1].position, 3, 1200))
    assert follow(begun, *links) == [Stale, Stale, Apply, Apply]


def test_a_new_chain_may_begin_with_a_snapshot_in_the_middle_of_another() -> None:
    links = chain(2)
    begun = Chain()
    begin(begun, Snapshot(sha256("B"), links[1].position, 3, 1200))
    resumed = chain(2, epoch=4, parent=sha256("B"), base_sha256=sha256("B"))
    assert follow(begun, *resumed) == [Apply, Apply]


def test_a_delta_is_applied_once(at_base: Chain) -> None:
    first, second = chain(2)
    assert follow(at_base, first, first, second, first, second) == [
        *(Apply, Stale, Apply, Stale, Stale)
    ]
    verdict = judge(at_base, second)
    assert verdict == Stale("delta 00000003-00000002 is loaded already")


def test_another_delta_of_a_rank_that_was_applied_is_stale(at_base: Chain) -> None:
    follow(at_base, *chain(2))
    forged = made(rank=DeltaRank(3, 2), parent=sha256("elsewhere"))
    assert judge(at_base, forged) == Stale(
        "delta 00000003-00000002 comes before 00000003-00000002, which is loaded"
    )


def test_a_missing_delta_is_a_gap_until_it_comes(at_base: Chain) -> None:
    links = chain(4)
    assert follow(at_base, links[0], links[2], links[3]) == [Apply, Gap, Gap]
    verdict = judge(at_base, links[3])
    assert isinstance(verdict, Gap)
    assert verdict.text == (
        "delta 00000003-00000004 does not follow delta 00000003-00000001: its parent is "
        f"{links[2].sha256}"
    )
    assert follow(at_base, *links) == [Stale, Apply, Apply, Apply]


def test_the_deltas_of_an_earlier_chain_are_stale_and_no_gap() -> None:
    """A snapshot without a delta begins a chain; those before it brought what it contains."""
    earlier = chain(3)
    begun = Chain()
    begin(begun, Snapshot(sha256("C"), None, 3, 1350))
    later = chain(2, first=4, parent=sha256("C"), base_sha256=sha256("C"))
    assert follow(begun, *earlier, *later) == [Stale] * 3 + [Apply] * 2
    begin(begun, Snapshot(sha256("C"), None, 3, 1350))
    verdict = judge(begun, earlier[0])
    assert verdict == Stale(
        "delta 00000003-00000001 is older than the loaded snapshot, of 1,350 examples"
    )


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        (
            {"run": OTHER_RUN},
            "run",
            f"delta 00000003-00000001 is of run {OTHER_RUN}, and run {RUN}",
        ),
        ({"model": "x\ny"}, "model", r"is of model 'x\\ny', and 'default' is loaded"),
        ({"identity_sha256": sha256("x")}, "schema", "is of other fields or models"),
    ],
)
def test_a_delta_of_another_run_model_or_schema_is_refused(
    at_base: Chain, changes: dict[str, Any], reason: str, text: str
) -> None:
    verdict = judge(at_base, made(**changes))
    assert isinstance(verdict, Refused)
    assert verdict.reason == reason
    assert text in verdict.text
    assert follow(at_base, *chain(1)) == [Apply], "it changed nothing"


def test_a_delta_that_does_not_follow_cannot_be_applied(at_base: Chain) -> None:
    first, second, third = chain(3)
    with pytest.raises(ValueError, match="does not follow the loaded snapshot"):
        at_base.applied(second.header, second.sha256)
    follow(at_base, first, second)
    for link in (first, second):
        with pytest.raises(ValueError, match="does not follow delta 00000003-00000002"):
            at_base.applied(link.header, link.sha256)
    at_base.applied(third.header, third.sha256)


# -- snapshots on the chain ------------------------------------------------------------------------


def test_a_chain_holds_the_links_that_were_applied(at_base: Chain) -> None:
    links = chain(3)
    follow(at_base, *links[:2])
    assert [at_base.holds(link.position) for link in links] == [True, True, False]
    assert not at_base.holds(DeltaPosition(links[0].header.rank, links[1].sha256))


def test_links_are_forgotten_beyond_a_bound(
    at_base: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_chain, "MOST_LINKS", 2)
    links = chain(3)
    follow(at_base, *links)
    assert [at_base.holds(link.position) for link in links] == [False, True, True]


def test_a_snapshot_that_was_reached_is_adopted_and_the_next_chain_begins_with_it(
    at_base: Chain,
) -> None:
    links = chain(3)
    follow(at_base, *links[:2])
    assert not at_base.adopt(sha256("later"), links[2].position)
    assert at_base.adopt(sha256("B"), links[1].position)
    (resumed,) = chain(1, epoch=4, parent=sha256("B"), base_sha256=sha256("B"))
    assert follow(at_base, resumed) == [Apply]


def test_a_snapshot_that_was_passed_is_adopted_but_no_chain_goes_on_from_there(
    at_base: Chain,
) -> None:
    links = chain(3)
    follow(at_base, *links)
    assert at_base.adopt(sha256("B"), links[1].position)
    (resumed,) = chain(1, epoch=4, parent=sha256("B"), base_sha256=sha256("B"))
    assert follow(at_base, resumed) == [Gap]
    assert at_base.awaited == sha256("B")
    assert not at_base.adopt(sha256("B"), links[1].position), "it must be loaded now"


def test_a_gap_within_a_chain_waits_for_no_snapshot_in_particular(at_base: Chain) -> None:
    links = chain(4)
    assert follow(at_base, links[0], links[1], links[3]) == [Apply, Apply, Gap]
    assert at_base.awaited is None


def test_a_base_that_was_loaded_already_is_not_waited_for(at_base: Chain) -> None:
    """The first delta of a chain is lost: to load its base once more would not bring it back."""
    links = chain(3, epoch=4)
    assert follow(at_base, links[1]) == [Gap]
    assert at_base.awaited is None


def test_a_later_epoch_ends_the_one_before(at_base: Chain) -> None:
    """A killed run's deltas stay on the topic, beside those of the run that was resumed."""
    links = chain(3)
    resumed = chain(2, epoch=4)
    assert follow(at_base, links[0], resumed[0], links[1]) == [Apply, Gap, Stale]
    assert judge(at_base, links[1]) == Stale(
        "delta 00000003-00000002 is superseded by those of epoch 4"
    )
    assert at_base.awaited == BASE_SHA256
    begin(at_base, BASE_SNAPSHOT)
    assert follow(at_base, *links, *resumed) == [Stale] * 3 + [Apply] * 2


def test_a_rollback_makes_the_deltas_after_its_snapshot_void(at_base: Chain) -> None:
    """The base or a snapshot on the chain is published again, under a later epoch."""
    links = chain(3)
    for snapshot in (BASE_SNAPSHOT, Snapshot(sha256("B"), links[0].position, 3, 1100)):
        begin(at_base, replace(snapshot, epoch=5))
        assert follow(at_base, *links) == [Stale] * 3
    assert judge(at_base, links[2]) == Stale(
        "delta 00000003-00000003 is superseded by those of epoch 5"
    )
    begin(at_base, Snapshot(sha256("D"), None, 5, 1400))
    later = chain(2, epoch=5, parent=sha256("D"), base_sha256=sha256("D"))
    assert follow(at_base, *links, *later) == [Stale] * 3 + [Apply] * 2


def test_the_epochs_of_another_run_say_nothing_about_this_one(at_base: Chain) -> None:
    assert follow(at_base, *chain(1, epoch=9, parent=sha256("x"))) == [Gap]
    at_base.begin(
        sha256("other"),
        None,
        run=OTHER_RUN,
        model="default",
        identity_sha256=IDENTITY,
        epoch=1,
        examples=0,
    )
    other = chain(2, epoch=1, parent=sha256("other"), run=OTHER_RUN)
    assert follow(at_base, *other) == [Apply, Apply]


# -- any order -----------------------------------------------------------------------------------


@dataclass
class History:
    """The true chains of a run: deltas and snapshots of two epochs, the second of which resumes.

        base <- 1 <- 2 <- 3 <- 4 ...          epoch 3
                     ^
                     resumed <- 1 <- 2 ...    epoch 4 begins with a published snapshot of epoch 3

    `snapshots` are those that were published, in their order.
    """

    links: list[Made]
    snapshots: list[Snapshot]

    def reaches(self, snapshot: Snapshot, applied: list[Made]) -> bool:
        """Return whether these deltas follow this snapshot and one another."""
        heads = {snapshot.manifest_sha256}
        if snapshot.position:
            heads.add(snapshot.position.sha256)
        for link in applied:
            if link.header.parent not in heads:
                return False
            heads = {link.sha256}
        return True


def snapshots_on(links: list[Made], every: int) -> list[Snapshot]:
    return [
        Snapshot(
            sha256(f"snapshot at {link.header.rank.name}"),
            link.position,
            link.header.rank.epoch,
            link.header.examples,
        )
        for link in links[every - 1 :: every]
    ]


def history(first_length: int, published: int, second_length: int) -> History:
    """Return a run that was killed after so many snapshots, and resumed from the last of them."""
    first = chain(first_length)
    snapshots = [BASE_SNAPSHOT, *snapshots_on(first, 2)[:published]]
    resumed = snapshots[-1].manifest_sha256
    second = chain(second_length, epoch=4, parent=resumed, base_sha256=resumed)
    return History([*first, *second], [*snapshots, *snapshots_on(second, 3)])


histories = st.builds(history, st.integers(1, 8), st.integers(0, 8), st.integers(0, 8))


@given(histories, st.data())
def test_what_is_applied_is_always_a_path_of_the_true_chain(
    true: History, data: st.DataObject
) -> None:
    """Drops, repeats, any order, two epochs mixed, snapshots loaded at any time."""
    followed = Chain()
    snapshot = data.draw(st.sampled_from(true.snapshots))
    begin(followed, snapshot)
    applied: list[Made] = []
    for _ in range(data.draw(st.integers(0, 40))):
        if data.draw(st.integers(0, 9)) == 0:
            snapshot = data.draw(st.sampled_from(true.snapshots))
            begin(followed, snapshot)
            applied = []
        link = data.draw(st.sampled_from(true.links))
        if follow(followed, link) == [Apply]:
            applied.append(link)
        assert true.reaches(snapshot, applied)
        ranks = [each.header.rank for each in applied]
        assert ranks == sorted({*ranks}), "no delta twice, none after a later one"


class Follower:
    """A subscriber, which loads the published snapshot when it is newer or awaited."""

    def __init__(self, true: History, begun_at: int = 0) -> None:
        self.chain = Chain()
        self.loads = 0
        self._true = true
        self._load(begun_at % len(true.snapshots))

    def follow_to_the_end(self, deliver: Callable[[], Iterator[Made]]) -> None:
        """Read everything again and again, until that changes nothing."""
        for _ in range(4 + len(self._true.links)):
            if not self._read(deliver()):
                return
        raise AssertionError("it loads and reads again and again")

    def _read(self, links: Iterator[Made]) -> bool:
        changed = self._look_at_pointer()
        for link in links:
            verdict = judge(self.chain, link)
            if isinstance(verdict, Apply):
                self.chain.applied(link.header, link.sha256)
                changed = True
            if isinstance(verdict, Gap) and self._look_at_pointer():
                return True
        return changed

    def _look_at_pointer(self) -> bool:
        newest = self._true.snapshots[-1]
        index = len(self._true.snapshots) - 1
        if newest.position and self.chain.adopt(newest.manifest_sha256, newest.position):
            return False
        if index > self._loaded or newest.manifest_sha256 == self.chain.awaited:
            self._load(index)
            return True
        return False

    def _load(self, index: int) -> None:
        self._loaded = index
        self.loads += 1
        begin(self.chain, self._true.snapshots[index])


@given(histories, st.integers(0, 8), st.data())
def test_with_everything_on_the_topic_a_subscriber_reaches_the_end_and_rests(
    true: History, begun_at: int, data: st.DataObject
) -> None:
    follower = Follower(true, begun_at)
    repeated = data.draw(st.lists(st.sampled_from(true.links), max_size=10))
    follower.follow_to_the_end(lambda: iter([*true.links, *repeated]))
    assert follower.chain.holds(true.links[-1].position)
    assert follower.chain.rank == true.links[-1].header.rank
    assert follower.loads <= 3


@given(histories, st.integers(0, 8), st.data())
def test_after_any_loss_a_snapshot_on_the_chain_leads_on(
    true: History, begun_at: int, data: st.DataObject
) -> None:
    lost = data.draw(st.sets(st.integers(0, len(true.links) - 1)))
    left = [link for index, link in enumerate(true.links) if index not in lost]
    follower = Follower(true, begun_at)
    follower.follow_to_the_end(lambda: iter(left))
    # Now a snapshot is published at the end of the true chain, and one more delta is sent.
    last = true.links[-1]
    epoch = last.header.rank.epoch
    true.snapshots.append(Snapshot(sha256("new"), last.position, epoch, last.header.examples))
    (further,) = chain(
        1,
        epoch=epoch,
        first=last.header.rank.sequence + 1,
        parent=last.sha256,
        base_sha256=last.header.base_sha256,
    )
    follower.follow_to_the_end(lambda: iter([*left, further]))
    assert follower.chain.rank == further.header.rank
    assert follower.chain.holds(further.position)
