"""The schedule: flags come late from a busy or stopped process, and they come once."""

import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, tzinfo

import apscheduler.schedulers.base
import pytest
from support.patience import PATIENCE_SECONDS, started, wait_until

from stream_ctr.errors import ConfigError
from stream_ctr.train import schedule
from stream_ctr.train.schedule import Schedule


def test_a_flag_comes_one_interval_after_the_start_and_is_taken_once() -> None:
    began = time.monotonic()
    with Schedule({"report": 0.3, "snapshot": 60.0}) as due:
        assert not due.due("report")
        wait_until(lambda: due.due("report"))
        assert time.monotonic() - began >= 0.3
        assert not due.due("report")
        assert not due.due("snapshot")


def test_flags_keep_coming() -> None:
    began = time.monotonic()
    with Schedule({"report": 0.1}) as due:
        for _ in range(5):
            wait_until(lambda: due.due("report"))
        assert time.monotonic() - began > 0.45


def test_a_loop_that_is_busy_over_several_intervals_finds_one_flag_and_not_several() -> None:
    with Schedule({"report": 0.3}) as due:
        time.sleep(1.0)  # three intervals pass while nobody looks
        wait_until(due._flags["report"].is_set)
        due.stop()  # else the next one might come between two questions
        assert [due.due("report") for _ in range(3)] == [True, False, False]


STOPPED_CHILD = """
import time
from stream_ctr.train.schedule import Schedule
began = time.monotonic()
with Schedule({"report": 6.0}) as due:
    time.sleep(0.2)  # the scheduler's thread has looked at its calendar and waits
    print("started", flush=True)
    while not due.due("report"):
        time.sleep(0.005)
    print(time.monotonic() - began, flush=True)
"""


@pytest.mark.fault(30, injected="SIGSTOP of the process over the time when a flag is due")
@pytest.mark.slow
def test_a_process_stopped_for_longer_than_the_default_grace_still_gets_its_flag_late() -> None:
    child = started(
        subprocess.Popen([sys.executable, "-c", STOPPED_CHILD], stdout=subprocess.PIPE, text=True)
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(
        7.5
    )  # at least 1.5 s late when it goes on, which is over APScheduler's default grace of 1 s
    child.send_signal(signal.SIGCONT)
    assert 7.5 < float(child.stdout.readline()) < 12.0  # the missed one, not the one after it
    assert child.wait(PATIENCE_SECONDS) == 0


class MovedClock(datetime):
    """The wall clock as APScheduler reads it, `moved` seconds from the true one."""

    moved = 0.0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(seconds=cls.moved)


@pytest.mark.fault(
    18, injected="the clock that the schedule plans by set an hour back, and forward"
)
@pytest.mark.parametrize("moved", [-3600.0, +3600.0])
def test_the_cadence_holds_when_the_wall_clock_is_set_by_an_hour(
    monkeypatch: pytest.MonkeyPatch, moved: float
) -> None:
    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", MovedClock)
    monkeypatch.setattr(schedule, "time", lambda: time.time() + MovedClock.moved)
    began = time.monotonic()
    with Schedule({"report": 0.2}) as due:
        wait_until(lambda: due.due("report"))
        monkeypatch.setattr(MovedClock, "moved", moved)
        for _ in range(4):
            wait_until(lambda: due.due("report"))
        assert time.monotonic() - began >= 0.6  # at a forward step one comes early


def test_stopping_ends_the_thread_and_a_schedule_can_start_again() -> None:
    before = set(threading.enumerate())
    due = Schedule({"report": 0.05})
    for _ in range(2):
        due.start()
        assert set(threading.enumerate()) - before
        wait_until(lambda: due.due("report"))
        due.stop()
        assert not set(threading.enumerate()) - before
    due.due("report")
    time.sleep(0.15)
    assert not due.due("report")
    due.stop()


@pytest.mark.parametrize("seconds", [0.0, -5.0, float("nan"), float("inf")])
def test_an_interval_that_is_no_positive_time_is_refused_by_name(seconds: float) -> None:
    with pytest.raises(
        ConfigError,
        match=f"interval of 'report' must be a positive number of seconds, got {seconds}",
    ):
        Schedule({"report": seconds})


def test_an_unknown_name_is_an_error() -> None:
    with Schedule({"report": 60.0}) as due, pytest.raises(KeyError, match="reports"):
        due.due("reports")


def test_nothing_is_due_before_the_start() -> None:
    due = Schedule({"report": 0.01})
    time.sleep(0.05)
    assert not due.due("report")
