"""A working folder has one run; the second is told who holds it, and a dead run holds nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_opt.datasets import FolderInUseError, folder_lock

HOLD = """
import sys, pathlib
sys.path.insert(0, {root!r})
from diffusion_opt.datasets.folder_lock import folder_lock
with folder_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until its input is closed."""
    program = HOLD.format(root=str(Path(__file__).parents[2]))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_free_folder_is_made_held_and_left_clean(tmp_path):
    with folder_lock(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".run.lock"]
    assert list((tmp_path / "new").iterdir()) == []


def test_the_second_run_is_told_who_holds_the_folder_and_may_go_on_after_it(tmp_path, holder):
    told = rf"is in use \(run\) by process {holder.pid} on .* since .*; wait"
    with pytest.raises(FolderInUseError, match=told), folder_lock(tmp_path):
        pytest.fail("two runs in one folder")
    holder.communicate()
    with folder_lock(tmp_path):
        pass


def test_a_lock_that_a_killed_run_left_stops_nobody(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".run.lock").is_file()
    with folder_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_locks_of_different_work_do_not_exclude_each_other_and_one_is_held_once_in_a_process(tmp_path):
    told = rf"\(student\) by process {os.getpid()}"
    with folder_lock(tmp_path, "student"), folder_lock(tmp_path, "training"):
        with pytest.raises(FolderInUseError, match=told), folder_lock(tmp_path, "student"):
            pytest.fail("held twice")
        assert (tmp_path / ".student.lock").is_file()


def test_it_is_given_up_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), folder_lock(tmp_path):
        1 / 0  # noqa: B018
    with folder_lock(tmp_path):
        pass
