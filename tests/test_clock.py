"""The clocks: turns, repeats, and what the GPU's does, told by a GPU that keeps a diary."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from sparsekit import clock


class Card:
    """A GPU of one queue: work runs when it is waited for, in order, each launch in its own time (us)."""

    def __init__(self, monkeypatch):
        self.now, self.host, self.queue, self.diary, self.slept = 0.0, 0.0, [], [], []
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.host * 1e-6)
        monkeypatch.setattr(clock.device, "settle", self.wait)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch, "empty", lambda *size, **how: SimpleNamespace(zero_=self.launch("flush", 50, 3)))

    def sleep(self, cycles):
        self.slept.append(cycles / 2000)
        self.queue.append(("sleep", cycles / 2000))

    def launch(self, name, us, host_us=5.0):
        def run():
            self.host += host_us
            self.queue.append((name, us))

        return run

    def wait(self):
        for name, what in self.queue:
            if name == "mark":
                what.at = self.now
            else:
                self.now += what
                self.diary.append(name)
        self.queue.clear()
        self.host = max(self.host, self.now)


class Event:
    def __init__(self, card):
        self.card, self.at = card, None

    def record(self):
        self.card.queue.append(("mark", self))

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def test_events_time_the_device_apart_from_the_host(card):
    found = clock.race({"a": card.launch("a", 40), "b": card.launch("b", 8, 20)}, 0, least=4, clock=clock.Events())
    assert found["a"] == [(pytest.approx(40), pytest.approx(5))] * 4
    assert found["b"] == [(pytest.approx(8), pytest.approx(20))] * 4
    rounds = "".join(card.diary[4:]).replace("sleep", "|").split("|")[1:]
    assert ["".join(sorted(names)) for names in rounds] == ["ab"] * 6  # two rounds settle, and do not count


def test_the_device_sleeps_about_as_long_as_the_host_takes_to_queue(card):
    slow = {"a": card.launch("a", 1, 1000.0), "b": card.launch("b", 1, 3000.0)}
    clock.race(slow, 0, least=3, clock=clock.Events())
    assert card.slept[0] == 20000 and card.slept[1:] == [pytest.approx(1.5 * 4000 + 100)] * 4
    events = clock.Events()
    events.round([(card.launch("a", 1, 1e6), 1)])
    events.round([(card.launch("a", 1, 1e6), 1)])
    assert card.slept[-1] == 50000  # the queue holds no more


def test_flushing_is_not_timed(card):
    (sample,) = clock.race({"a": card.launch("a", 40)}, 0, least=1, clock=clock.Events(flush=True))["a"]
    assert sample.us == pytest.approx(40) and card.diary[-2:] == ["flush", "a"]


def test_cheap_calls_are_repeated_by_the_wall_clock_and_hopeless_ones_called_no_more(card):
    seen = []
    thunks = {"a": card.launch("a", 20), "slow": card.launch("slow", 5000)}
    found = clock.race({name: lambda n=name, t=thunk: (seen.append(n), t()) for name, thunk in thunks.items()}, 0,
                       hopeless=3.0)  # fmt: skip
    assert seen.count("slow") == 2 and len(found["slow"]) == 1 and len(found["a"]) == 5
    assert seen.count("a") == 2 + 5 * (1 + 10)  # a turn of 200 us after a call that is not timed


def test_every_thunk_runs_after_every_other(card):
    thunks = {name: card.launch(name, 1.2e5) for name in "abc"}  # too slow to be repeated
    samples = clock.race(thunks, 1.0, least=30, most=30, slow=1.0)
    assert [len(found) for found in samples.values()] == [30, 30, 30]
    rounds = ["".join(card.diary[start : start + 3]) for start in range(6, len(card.diary), 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"} and len(set(rounds)) == 6


def test_where_the_fastest_leaves_caches_warm_all_are_warmed(card):
    thunks = {"a": card.launch("a", 9e4), "b": card.launch("b", 3e5)}
    samples = clock.race(thunks, 0, least=3)
    assert [len(found) for found in samples.values()] == [1 + 1] * 2  # the first counts, a half of the rounds follow
    assert card.diary[4:] in (["a"] * 3 + ["b"] * 3, ["b"] * 3 + ["a"] * 3)  # one that is not timed, two that are


def test_a_thunk_that_times_itself_is_asked():
    def remote():
        raise AssertionError("its own clock is asked instead")

    def timed(count):
        return 7e-6 * count

    remote.timed = timed
    assert clock.Wall().round([(remote, 3)]) == [(pytest.approx(7), pytest.approx(7))]


def test_buffers_take_turns():
    seen = []
    run = clock.rotating([lambda i=i: seen.append(i) or i for i in range(3)])
    assert [run() for _ in range(4)] == [0, 1, 2, 0] and seen == [0, 1, 2, 0]
    only = object()
    assert clock.rotating([only]) is only


def test_a_graph_is_warmed_aside_captured_once_and_replayed(monkeypatch):
    diary = []

    def say(word):
        return lambda *_: diary.append(word)

    @contextlib.contextmanager
    def inside(what):
        diary.append(f"in {what}")
        yield
        diary.append(f"out {what}")

    class Stream(str):
        def wait_stream(self, other):
            diary.append(f"{self} waits for {other}")

    class Graph(str):
        replay = say("replay")

    fakes = {"Stream": lambda: Stream("aside"), "current_stream": lambda: Stream("main"), "stream": inside,
             "CUDAGraph": lambda: Graph("graph"), "graph": inside}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    run = clock.graphed(lambda: diary.append("work") or "result")
    assert run() == run() == "result"
    assert diary == [
        "aside waits for main", "in aside", "work", "work", "work", "out aside", "main waits for aside",
        "in graph", "work", "out graph", "replay", "replay",
    ]  # fmt: skip
