"""The logger "jitnorm": what people see by default, and that applications decide about it the standard way."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading

import pytest
from processes import run_before_import, run_fresh

from jitnorm.jit.log import DefaultHandler, logger, warn_once

# Logs a message of each level, without importing torch: the import of the engine is tested in test_load.py.
ALONE = """
import importlib.util, logging, sys
spec = importlib.util.spec_from_file_location("log", {path!r})
log = importlib.util.module_from_spec(spec)
spec.loader.exec_module(log)
print("imported", file=sys.stderr)
for name in ("debug", "info", "warning", "error"):
    getattr(logging.getLogger("jitnorm"), name)("a %s of %d%%", name, 100)
"""


@pytest.fixture
def alone():
    return ALONE.format(path=sys.modules["jitnorm.jit.log"].__file__)


@pytest.fixture
def unconfigure(monkeypatch):
    """Makes a process that has configured no logging, and returns its stderr. Pytest configures it for each test."""

    def make() -> io.StringIO:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        return sys.stderr

    return make


def test_people_see_builds_and_problems_by_default(unconfigure):
    stderr = unconfigure()
    logger.debug("not this")
    logger.info("building %s", "a kernel")
    logger.warning("a problem")
    assert stderr.getvalue() == "jitnorm: building a kernel\njitnorm: a problem\n"


# The level that each value of JITNORM_LOG shows first; an empty one is as good as none.
@pytest.mark.parametrize(
    ("value", "first"),
    [("debug", 0), ("info", 1), ("warning", 2), ("error", 3), ("off", 4), (" WARNING ", 2), ("", 1), (None, 1)],
)
def test_the_variable_sets_the_level(alone, value, first):
    said = run_fresh(alone, JITNORM_LOG=value)
    lines = [f"jitnorm: a {name} of 100%" for name in ("debug", "info", "warning", "error")][first:]
    assert said.returncode == 0 and said.stderr.splitlines() == ["imported", *lines]


def test_a_wrong_value_is_one_warning(alone):
    said = run_fresh(alone, JITNORM_LOG="loud")
    first, *others = said.stderr.splitlines()
    assert first == "jitnorm: JITNORM_LOG must be debug, info, warning, error, off, got 'loud': the level is info"
    assert said.returncode == 0 and len(others) == 4


def test_a_wrong_value_does_not_stop_the_import():
    said = run_before_import("import jitnorm; print(jitnorm.__version__)", JITNORM_LOG="loud")
    assert said.returncode == 0 and said.stdout and said.stderr.count("\n") == 1


def test_a_level_that_the_application_set_before_the_import_stays(alone):
    script = "import logging\nlogging.getLogger('jitnorm').setLevel(logging.ERROR)\n"
    assert run_fresh(script, alone, JITNORM_LOG=None).stderr.splitlines() == ["imported", "jitnorm: a error of 100%"]


@pytest.mark.parametrize("name", ["jitnorm", ""], ids=["own", "root"])
def test_a_handler_of_the_application_gets_each_message_once(unconfigure, monkeypatch, name):
    stderr = unconfigure()
    received = io.StringIO()
    target = logging.getLogger(name)
    monkeypatch.setattr(target, "handlers", [*target.handlers, logging.StreamHandler(received)])
    logger.info("building")
    assert received.getvalue() == "building\n" and not stderr.getvalue()


def test_nothing_twice_where_the_application_logs_to_stderr(unconfigure, monkeypatch):
    stderr = unconfigure()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    logger.warning("a problem")
    assert stderr.getvalue() == "a problem\n"


@pytest.mark.parametrize("how", ["level", "propagate", "null handler", "disabled"])
def test_an_application_can_silence_it(unconfigure, monkeypatch, how):
    stderr = unconfigure()
    if how == "level":
        monkeypatch.setattr(logger, "level", logging.CRITICAL)
        logger.manager._clear_cache()
    elif how == "propagate":
        monkeypatch.setattr(logger, "propagate", False)
    elif how == "disabled":
        monkeypatch.setattr(logger, "disabled", True)
    else:
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, logging.NullHandler()])
    logger.warning("a problem")
    monkeypatch.undo()
    logger.manager._clear_cache()
    assert not stderr.getvalue()


def test_stderr_is_looked_up_at_each_message(unconfigure, monkeypatch):
    stderr = unconfigure()
    later = io.StringIO()
    logger.info("first")
    monkeypatch.setattr(sys, "stderr", later)
    logger.info("second")
    assert (stderr.getvalue(), later.getvalue()) == ("jitnorm: first\n", "jitnorm: second\n")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def broken_pipe() -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)


class Without:
    """A stream that has lost its methods."""


@pytest.mark.parametrize("make", [lambda: None, closed, broken_pipe, Without])
def test_a_vanished_stderr_never_raises(unconfigure, monkeypatch, capfd, make):
    unconfigure()
    monkeypatch.setattr(sys, "stderr", make())
    logger.warning("nobody reads this")
    assert capfd.readouterr() == ("", "")


def test_a_warning_comes_once(caplog):
    warn_once.cache_clear()
    for _ in range(2):
        warn_once("100% gone")
    assert [record.getMessage() for record in caplog.records] == ["100% gone"]


def test_the_package_has_one_handler():
    assert [type(handler) for handler in logger.handlers] == [DefaultHandler]


def test_a_fork_while_another_thread_logs(unconfigure, monkeypatch):
    """The child does not wait for the parent's lock, and its message is whole."""
    unconfigure()

    class Slow(io.StringIO):
        def write(self, text):
            entered.set()
            leave.wait(30)
            return len(text)

    entered, leave = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "stderr", Slow())
    thread = threading.Thread(target=logger.info, args=["from the parent"])
    thread.start()
    assert entered.wait(30)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        sys.stderr = os.fdopen(write, "w")
        logger.info("from the child")
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "jitnorm: from the child\n"
    leave.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0


def test_messages_of_threads_are_whole_lines(unconfigure):
    stderr = unconfigure()
    threads = [threading.Thread(target=logger.info, args=["x" * 100]) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stderr.getvalue().splitlines() == [f"jitnorm: {'x' * 100}"] * 20
