import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sgl_vtensor.cli import server
from sgl_vtensor.cli.demo import Turn, cache_figures, server_flags, size, table
from sgl_vtensor.cli.main import main
from sgl_vtensor.cli.server import Server, free_port, group_members

FAKE = Path(__file__).with_name("fake_server.py")
CACHE = {
    "pages_backed": 1200,
    "pages_shared": 4,
    "driver_calls": {"create": 12, "map": 20, "unmap": 1, "release": 0},
    "backed_bytes": 3 << 20,
    "stock_bytes": 4 << 30,
}

# The demo in a process of its own, with the fake in SGLang's place and its log elsewhere.
DEMO = f"""
import sys
from pathlib import Path
from sgl_vtensor.cli import demo, main, server
demo.LOGS = Path(sys.argv[1])
server.GRACE_SECONDS = 1.0
options = main.parser().parse_args(["demo", *sys.argv[2:]])
sys.exit(main.reported(lambda: demo.run(options, command=[sys.executable, {str(FAKE)!r}])))
"""


def demo(tmp_path: Path, *arguments: str, **keywords: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-u", "-c", DEMO, str(tmp_path), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, stdin=subprocess.DEVNULL, **keywords)  # type: ignore[call-overload]


def fakes(tmp_path: Path) -> list[int]:
    """The processes of the fake server and its child, found by the log that both write to."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if entry.readlink().parent == tmp_path:
                found.append(int(entry.parts[2]))
        except OSError:
            continue  # ended while we looked
    return found


def wait(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def rendered(turns: list[Turn]) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(table(turns))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_free_port_is_the_wanted_one_or_one_behind_that_no_outgoing_connection_gets() -> None:
    port = free_port(0, "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        other = free_port(port, "127.0.0.1")
        assert port < other < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert free_port(port, "127.0.0.1") == port


def test_table_shows_the_last_four_turns() -> None:
    text = rendered([Turn(100 * n, 64 * n, 0.25, 33, CACHE) for n in range(1, 6)])
    assert "turn 5" in text and "turn 2" in text and "turn 1" not in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "500" in lines["prompt tokens"] and "320" in lines["of them cached"]
    assert "1,200" in lines["pages backed"] and "33" in lines["driver calls"]
    assert "3.0 MiB" in lines["physical memory"] and "4.0 GiB" in lines["stock SGLang takes"]


def test_table_without_figures_of_the_cache_shows_tokens_only() -> None:
    text = rendered([Turn(100, 0, 0.25, 0, {})])
    assert "prompt tokens" in text and "pages" not in text


def test_table_with_figures_for_some_turns() -> None:
    assert "│      - │" in rendered([Turn(100, 0, 0.25, 0, {}), Turn(100, 0, 0.25, 33, CACHE)])


@pytest.mark.parametrize("info", [{}, {"internal_states": []}, {"internal_states": [{"vtensor": None}]}])
def test_cache_figures_tolerates_a_server_without_the_plugin(info: dict[str, object]) -> None:
    assert cache_figures(info) == {}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (23040, "22.5 KiB"), (80 << 30, "80.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def test_flags_for_the_cpu_are_not_given_on_a_gpu() -> None:
    assert "--device" in server_flags(1, cuda=False)
    assert "--device" not in server_flags(1, cuda=True)
    assert "--enable-vtensor" in server_flags(1, cuda=True)


def test_stop_ends_children_that_ignore_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.5)
    command = [sys.executable, str(FAKE), "--port", str(free_port(0, "127.0.0.1"))]
    with Server(command, tmp_path / "log", os.environ) as running:
        wait(lambda: running.last_lines(1) == ["child"])
        assert len(group_members(running.group)) == 2
    wait(lambda: group_members(running.group) == [])  # a killed process needs a moment on a busy machine


def test_nobody_waits_for_those_who_obey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 600.0)
    with Server(["sleep", "600"], tmp_path / "log", os.environ) as running:
        begin = time.monotonic()
    assert time.monotonic() - begin < 300
    assert not running.running()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port=65536"], "--port 65536 is no port"),
        (["--port=-1"], "--port -1 is no port"),
        (["--model-path=/nowhere"], "/nowhere has no config.json"),
    ],
)
def test_what_cannot_start_is_said_before_sglang_is(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgl_vtensor.cli.demo.Server", lambda *_: pytest.fail("it was started"))
    assert main(["demo", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_command_that_does_not_exist_leaves_no_guard(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Server([str(tmp_path / "nothing")], tmp_path / "log", os.environ)


def test_demo_twice_with_the_port_taken_the_second_time(tmp_path: Path) -> None:
    with socket.socket() as taken:
        port = str(free_port(0, "127.0.0.1"))
        for attempt in range(2):
            run = demo(tmp_path, "--port", port)
            output, errors = run.communicate(timeout=120)
            assert run.returncode == 0, errors
            assert (f"Port {port} is taken" in output) == (attempt == 1)
            assert "[answer]6" in output and "turn 3" in output and "4.0 GiB" in output
            assert not fakes(tmp_path)
            if attempt == 0:
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken.bind(("127.0.0.1", int(port)))
                taken.listen()


def test_demo_shows_the_log_of_a_server_that_does_not_start(tmp_path: Path) -> None:
    run = demo(tmp_path, "--", "--fail")
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "SGLang did not start" in errors and "unrecognized arguments" in errors and "Traceback" not in errors


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_demo_takes_the_server_along_however_it_ends(tmp_path: Path, name: str) -> None:
    number = signal.Signals[name]
    # No answer comes from this server: --port is given again, so it listens elsewhere, and the demo waits.
    elsewhere = str(free_port(0, "127.0.0.1"))
    run = demo(tmp_path, "--", "--port", elsewhere)
    wait(lambda: b"child" in b"".join(log.read_bytes() for log in tmp_path.glob("*.log")))
    assert len(fakes(tmp_path)) == 2
    run.send_signal(number)
    run.communicate(timeout=60)
    wait(lambda: not fakes(tmp_path))
    assert run.returncode == (-number if number == signal.SIGKILL else 128 + number)


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "demo" in capsys.readouterr().out
