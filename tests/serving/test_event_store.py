"""The event store: what it keeps of events, and stores of earlier versions."""

import os
import random
import signal
import sqlite3
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blossomrec_hf.serving.event_store import Store, StoredEvent


EVENTS = st.builds(
    StoredEvent,
    item=st.integers(-(2**40), 2**40) | st.text(max_size=5),
    timestamp=st.none() | st.integers(0, 2**40),
    event_type=st.none() | st.text(max_size=5),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from(["anna", "béa"]), EVENTS), max_size=5), max_size=6))
def test_events_are_read_as_they_were_added(tmp_path_factory, batches):
    path = tmp_path_factory.mktemp("store") / "events.db"
    known = {"anna": [], "béa": []}
    for batch in batches:
        store = Store(path)  # opened anew each time
        store.add(batch)
        for user, event in batch:
            known[user].append(event)
        store.close()
    Store(path).close()
    store = Store(path, read_only=True)
    for user, events in known.items():
        assert store.latest(user, -1) == events and store.number(user) == len(events)
        assert store.latest(user, 2) == events[-2:]
        times = [event.timestamp for event in events if event.timestamp is not None]
        assert store.last_time(user) == (times[-1] if times else None)
    assert store.num_without_time() == sum(event.timestamp is None for events in known.values() for event in events)


def test_a_store_of_an_earlier_version_keeps_its_events_and_gets_times(tmp_path):
    path = tmp_path / "events.db"
    old = sqlite3.connect(path)
    old.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, user TEXT, item TEXT)")
    old.execute("CREATE INDEX by_user ON events (user, id)")
    old.executemany("INSERT INTO events (user, item) VALUES (?, ?)", [("anna", "3"), ("anna", '"x"')])
    old.commit()
    before = [StoredEvent(3), StoredEvent("x")]
    reader = Store(path, read_only=True)  # which changes nothing
    assert reader.latest("anna", -1) == before
    assert len(old.execute("PRAGMA table_info(events)").fetchall()) == 3
    reader.close()

    # What an interrupted change leaves: one of the two columns.
    old.execute("ALTER TABLE events ADD COLUMN timestamp INTEGER")
    old.commit()
    store = Store(path)
    assert store.latest("anna", -1) == before and store.num_without_time() == 2
    store.add([("anna", StoredEvent(4, 1_700_000_000, "view"))])
    assert store.latest("anna", -1) == [*before, StoredEvent(4, 1_700_000_000, "view")]
    assert store.last_time("anna") == 1_700_000_000 and store.num_without_time() == 2
    # The earlier version still writes to it.
    old.execute("INSERT INTO events (user, item) VALUES ('anna', '5')")
    old.commit()
    assert store.latest("anna", 1) == [StoredEvent(5)]
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
@pytest.mark.parametrize("attempt", range(3))
def test_acknowledged_events_survive_a_kill_at_any_moment_also_that_of_the_first_opening(tmp_path, attempt):
    path = tmp_path / "events.db"
    old = sqlite3.connect(path)
    old.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, user TEXT, item TEXT)")
    old.executemany("INSERT INTO events (user, item) VALUES ('anna', ?)", [[str(item)] for item in range(2000)])
    old.commit()
    old.close()
    known = [StoredEvent(item) for item in range(2000)]
    number = 2000
    for delay in (0.0, 0.002, 0.01, 0.05, 0.2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            store = Store(path)
            while True:
                store.add([("anna", StoredEvent(number, number, "view"))])
                os.write(writing, b"x")
                number += 1
        os.close(writing)
        time.sleep(delay * random.uniform(0.5, 1.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        acknowledged = len(os.read(reading, 2**20))
        os.close(reading)
        store = Store(path)
        events = store.latest("anna", -1)
        known += [StoredEvent(number + place, number + place, "view") for place in range(len(events) - len(known))]
        assert events == known and len(events) - number in (acknowledged, acknowledged + 1)
        number = len(events)
        store.close()
