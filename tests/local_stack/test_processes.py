"""Child processes: they say why they ended, end when asked, and never outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from local_stack.errors import NotReadyError, ProcessDiedError
from local_stack.processes import ChildProcess, describe_status, wait_until

Start = Callable[..., ChildProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `python -c SCRIPT` as a child, killed at the end of the test."""
    children: list[ChildProcess] = []

    def start(script: str, **options: object) -> ChildProcess:
        child = ChildProcess(
            "sample service",
            [sys.executable, "-c", textwrap.dedent(script)],
            log_path=tmp_path / "logs" / f"{len(children)}.log",
            **options,  # type: ignore[arg-type]
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting until {what}"
        time.sleep(0.02)


def wait_for_end(child: ChildProcess) -> None:
    wait_for(lambda: child.returncode is not None, "the child ended")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def read_pid(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"), f"{path.name} is written")
    return int(path.read_text())


def test_a_child_that_ended_is_named_with_its_status_and_the_end_of_its_log(start: Start) -> None:
    child = start("import sys; [print('line', i) for i in range(40)]; sys.exit('the model is too large')")
    wait_for_end(child)
    with pytest.raises(ProcessDiedError) as caught:
        child.require_healthy()
    message = str(caught.value)
    assert "the sample service ended with exit status 1" in message
    assert "the model is too large" in message
    assert "line 39" in message
    assert "line 3\n" not in message
    assert str(child.log_path) in message


def test_a_child_that_wrote_nothing_says_so(start: Start) -> None:
    child = start("pass")
    wait_for_end(child)
    assert child.log_tail() == f"Its log {child.log_path} is empty."


def test_a_program_that_does_not_exist_is_reported_by_its_log(tmp_path: Path) -> None:
    child = ChildProcess("absent", ["/does/not/exist"], log_path=tmp_path / "log")
    wait_for_end(child)
    with pytest.raises(ProcessDiedError, match="No such file or directory"):
        child.require_healthy()


def test_a_child_gets_the_variables_given_and_the_launcher_own_ones(start: Start) -> None:
    child = start(
        "import os; print(os.environ['COLOUR'], 'PATH' in os.environ)", environment={"COLOUR": "red"}
    )
    wait_for_end(child)
    assert child.log_path.read_text() == "red True\n"


def test_a_child_is_in_a_session_of_its_own_so_that_the_terminal_does_not_reach_it(start: Start) -> None:
    child = start("import time; time.sleep(60)")
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid != os.getsid(0)


def test_the_stop_signal_gives_a_child_time_to_finish_its_work(start: Start, tmp_path: Path) -> None:
    script = f"""
        import pathlib, time
        try:
            pathlib.Path({str(tmp_path / "ready")!r}).touch()
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.3)
            pathlib.Path({str(tmp_path / "saved")!r}).touch()
    """
    child = start(script, stop_signal=signal.SIGINT)
    wait_for((tmp_path / "ready").exists, "the child runs")
    assert child.stop(patience=30) == 0
    assert (tmp_path / "saved").exists()


def deaf_script(tmp_path: Path) -> str:
    return f"""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(60)
    """


def test_a_child_that_ignores_the_stop_signal_is_killed_after_the_stated_time(
    start: Start, tmp_path: Path
) -> None:
    child = start(deaf_script(tmp_path))
    wait_for((tmp_path / "ready").exists, "the child runs")
    assert child.stop(patience=0.3) == -signal.SIGKILL
    assert is_gone(child.pid)


def test_impatience_cuts_the_waiting_short(start: Start, tmp_path: Path) -> None:
    child = start(deaf_script(tmp_path))
    wait_for((tmp_path / "ready").exists, "the child runs")
    assert child.wait(patience=3600, hurry=lambda: True) == -signal.SIGKILL


def test_stopping_a_child_that_has_ended_keeps_its_status(start: Start) -> None:
    child = start("import sys; sys.exit(3)")
    wait_for_end(child)
    assert child.stop(patience=1) == 3
    child.kill()
    assert child.returncode == 3


def family_script(pid_file: Path, *, then: str) -> str:
    return f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path({str(pid_file)!r}).write_text(f"{{child.pid}}\\n")
        {then}
    """


@pytest.mark.parametrize("then", ["time.sleep(60)", "pass"])
def test_children_of_a_child_end_with_it(start: Start, tmp_path: Path, then: str) -> None:
    child = start(family_script(tmp_path / "pid", then=then))
    grandchild = read_pid(tmp_path / "pid")
    child.stop(patience=5)
    wait_for(lambda: is_gone(grandchild), "the grandchild is gone")


def test_a_child_that_ends_while_it_is_asked_to_stop_is_known_to_have_ended_and_its_children_end(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start(family_script(tmp_path / "pid", then="pass"))
    grandchild = read_pid(tmp_path / "pid")
    wait_for(lambda: is_gone(child.pid), "the child ended")
    with monkeypatch.context() as patched:  # as it was at the look just before the signal
        patched.setattr(ChildProcess, "returncode", None)
        child.ask_to_stop()
    assert child.stop(patience=5) == 0
    wait_for(lambda: is_gone(grandchild), "the grandchild is gone")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal exists on Linux only")
def test_nothing_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = f"""
        import pathlib, sys, time
        from local_stack.processes import ChildProcess
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        child = ChildProcess("sleeper", sleep, log_path=pathlib.Path({str(tmp_path / "log")!r}))
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(f"{{child.pid}}\\n")
        time.sleep(60)
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    child = read_pid(tmp_path / "pid")
    wait_for(lambda: "_tied_exec.py" not in " ".join(psutil.Process(child).cmdline()), "the child runs")
    launcher.kill()
    launcher.wait()
    wait_for(lambda: is_gone(child), "the child is gone")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal exists on Linux only")
def test_children_of_a_child_do_not_outlive_a_killed_launcher_where_that_is_asked_for(tmp_path: Path) -> None:
    family = textwrap.dedent(family_script(tmp_path / "grandchild", then="time.sleep(60)"))
    script = f"""
        import pathlib, sys, time
        from local_stack.processes import ChildProcess
        family = [sys.executable, "-c", {family!r}]
        ChildProcess("family", family, log_path=pathlib.Path({str(tmp_path / "log")!r}), has_children=True)
        time.sleep(60)
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    grandchild = read_pid(tmp_path / "grandchild")
    session = [each for each in psutil.process_iter() if os_session(each) == os.getsid(grandchild)]
    assert len(session) == 3  # child, watchdog, grandchild
    launcher.kill()
    launcher.wait()
    for each in session:
        wait_for(lambda pid=each.pid: is_gone(pid), f"{each} is gone")  # type: ignore[misc]


def os_session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


@pytest.mark.skipif(sys.platform != "linux", reason="there is a watchdog on Linux only")
def test_a_watched_child_is_stopped_and_tells_its_status_like_any_other(start: Start, tmp_path: Path) -> None:
    child = start(family_script(tmp_path / "pid", then="sys.exit(3)"), has_children=True)
    wait_for_end(child)
    assert child.returncode == 3
    wait_for(lambda: is_gone(read_pid(tmp_path / "pid")), "the grandchild is gone")
    child = start("import time; time.sleep(60)", has_children=True)
    assert child.stop(patience=30) == -signal.SIGTERM


def test_a_child_that_may_finish_is_healthy_after_it_did(start: Start) -> None:
    child = start("pass", may_finish=True)
    wait_for_end(child)
    child.require_healthy()


def test_a_child_that_may_finish_is_not_healthy_after_it_failed(start: Start) -> None:
    child = start("raise SystemExit(4)", may_finish=True)
    wait_for_end(child)
    with pytest.raises(ProcessDiedError, match="ended with exit status 4"):
        child.require_healthy()


def test_waiting_ends_when_the_child_is_ready(start: Start, tmp_path: Path) -> None:
    child = start(deaf_script(tmp_path))
    is_ready = (tmp_path / "ready").exists
    wait_until(child, is_ready, timeout=30, what="touch its file", watch=child.require_healthy)
    assert is_ready()


def test_waiting_for_a_child_that_dies_ends_at_once_with_its_log(start: Start) -> None:
    child = start("import sys; sys.exit('no memory left')")
    with pytest.raises(ProcessDiedError, match="no memory left"):
        wait_until(child, lambda: False, timeout=3600, what="answer", watch=child.require_healthy)


def test_waiting_too_long_says_for_what_and_how_long(start: Start) -> None:
    child = start("import time; print('still loading'); time.sleep(60)")
    wait_for(lambda: child.log_path.read_text() != "", "the child has written")
    with pytest.raises(
        NotReadyError, match=r"did not answer at /health within 0\.2 s\.\n.*\n  still loading"
    ):
        wait_until(child, lambda: False, timeout=0.2, what="answer at /health", watch=child.require_healthy)


def test_what_watches_can_end_the_waiting(start: Start) -> None:
    def watch() -> None:
        raise KeyboardInterrupt

    child = start("import time; time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        wait_until(child, lambda: False, timeout=3600, what="answer", watch=watch)
    assert child.returncode is None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit status 0"),
        (2, "ended with exit status 2"),
        (-9, "was ended by SIGKILL"),
        (-63, "was ended by signal 63"),
    ],
)
def test_an_exit_status_is_put_into_words(status: int, words: str) -> None:
    assert describe_status(status) == words
