"""Ctrl-C and SIGTERM end a script in one line and code 130, from its first import to its end."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).resolve().parents[1]
MAIN = """
    import signal, sys, time
    sys.path[0] = {project!r}
    from common.interrupts import shield_workers, stop_in_one_line
    stop_in_one_line()
    {before}
    from common.cli import run_script, DataError
    def main():
        {inside}
        return 0
    run_script(main)
"""


def run(inside="pass", before="pass", number=signal.SIGINT, **environment):
    """Run a script that says "ready" where it wants a signal; (exit code, standard error, standard output)."""
    code = textwrap.dedent(MAIN).format(project=str(PROJECT), before=before, inside=inside)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    said = process.stdout.readline()
    if said == "ready\n":
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, err, said + out


# Short naps: a signal between Python's last look for one and a long sleep is acted upon after the sleep.
WAIT = "print('ready', flush=True); [time.sleep(0.02) for _ in range(3000)]"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_signal_is_one_line_and_code_130(where, number):
    code, err, _ = run(number=number, **{where: WAIT})
    assert (code, err) == (130, "stopped; run the same command again to resume\n")


def test_a_second_signal_does_not_disturb_the_end_of_the_first():
    code, err, _ = run(
        "import atexit, os; atexit.register(lambda: (os.kill(os.getpid(), 2), os.kill(os.getpid(), 15))); " + WAIT
    )
    assert (code, len(err.splitlines())) == (130, 1)


def test_only_the_main_process_of_many_speaks():
    for where in ("before", "inside"):
        assert run(**{where: WAIT}, RANK="1")[:2] == (130, "")


@pytest.mark.parametrize(
    ("inside", "code", "words"),
    [
        ("raise DataError('a.nii: is bad; copy it again')", 1, "a.nii: is bad; copy it again"),
        ("raise DataError('a\\n\\x1b[2J.nii: is bad')", 1, r"a\n\x1b[2J.nii: is bad"),
        ("raise OSError(28, 'No space left on device', '/o/a.png')", 1,
         "/o/a.png: No space left on device; free some space and run the same command again"),
        ("raise OSError(36, 'File name too long', '/o/a')", 1, "/o/a: File name too long; give it a shorter name"),
        ("raise MemoryError", 1, "not enough memory; close other programs, or use fewer --workers or a smaller "
         "--batch-size"),
        ("sys.exit(2)", 2, None),
        ("return 3", 3, None),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(inside, code, words):
    assert run(inside)[:2] == (code, f"{words}\n" if words else "")


def test_a_full_disk_under_standard_output_is_one_line():
    code = textwrap.dedent(MAIN).format(project=str(PROJECT), before="pass", inside="print('x' * 100)")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "No space left on device; free some space" in done.stderr


def test_workers_hear_no_signal():
    """What a terminal sends to all, the main process alone acts upon."""
    inside = [
        "import subprocess",
        "with shield_workers():",
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
        "for number in (2, 15):",
        "    child.send_signal(number)",
        "time.sleep(0.3)",
        "alive = child.poll() is None",
        "child.kill()",
        "return 7 if alive else 8",
    ]
    code, err, _ = run("\n    ".join(inside))
    assert (code, err) == (7, "")
    code, _, _ = run(f"with shield_workers(): pass\n    {WAIT}")
    assert code == 130, "heard again after the block"


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Killed, it can't end them itself, and what they still wrote would lie beside what the next one writes."""
    begun = tmp_path / "begun"
    code = f"""
import sys, time
from pathlib import Path
from common.workers import run_in_workers
list(run_in_workers(lambda number: (Path({str(begun)!r} + str(number)).touch(), time.sleep(60)), [(0,), (1,)], 2))
"""
    master = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT)
    while not (tmp_path / "begun0").exists():
        time.sleep(0.05)
    workers = psutil.Process(master.pid).children(recursive=True)
    master.kill()
    master.wait()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=10)[1] == []
