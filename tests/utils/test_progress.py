"""A bar on a terminal and in a notebook; elsewhere log lines, at least one a minute."""

import logging
import sys
from types import SimpleNamespace

import pytest
from forked_commands import run_code
from tqdm import tqdm

from blossomrec_hf.utils import progress
from blossomrec_hf.utils.progress import LogLines, progress_bar


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(("terminal", "switched_off"), [(True, False), (True, True), (False, False)])
def test_a_bar_on_a_terminal_alone(monkeypatch, terminal, switched_off):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1" if switched_off else "")
    with progress_bar(total=3, description="Work") as bar:
        bar.update()
        bar.set_postfix({"loss": 1}, refresh=False)
    assert isinstance(bar, tqdm if terminal and not switched_off else LogLines)


@pytest.mark.parametrize(("config", "kind"), [({"IPKernelApp": {}}, tqdm), ({}, LogLines)])
def test_a_bar_in_a_notebook_whose_standard_error_is_no_terminal(monkeypatch, config, kind):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(config=config)))
    with progress_bar(total=1, description="Work") as bar:
        assert isinstance(bar, kind)


def test_one_line_a_minute(clock, caplog):
    caplog.set_level(logging.INFO)
    with LogLines(total=400, description="Training", initial=100) as lines:
        for step in range(1, 301):
            clock.seconds += 1.0
            if step == 90:
                lines.set_postfix({"loss": "2.5"}, refresh=False)
            lines.update()
    assert [record.message for record in caplog.records] == [
        "Training: 160 of 400 (40%), about 4 min left",
        "Training: 220 of 400 (55%), about 3 min left, loss 2.5",
        "Training: 280 of 400 (70%), about 2 min left, loss 2.5",
        "Training: 340 of 400 (85%), about 1 min left, loss 2.5",
        "Training: 400 of 400 (100%), about 0 min left, loss 2.5",
    ]


def test_other_processes_are_silent(clock, caplog):
    caplog.set_level(logging.INFO)
    lines = LogLines(total=2, description="Training", enabled=False)
    clock.seconds += 100
    lines.update()
    assert caplog.records == []


def test_messages_of_several_processes_are_logged_once(tmp_path):
    code = """
import logging
from blossomrec_hf.utils.progress import set_up_logging

set_up_logging()
logging.getLogger("blossomrec_hf.data").info("a message")
logging.getLogger("blossomrec_hf.data").warning("a warning")
"""
    done = run_code(code, folder=tmp_path / "code", num_processes=3)
    assert done.stderr.splitlines() == ["a message", *3 * ["a warning"]]
