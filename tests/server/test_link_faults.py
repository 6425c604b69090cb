"""Faults that a run on the link survives, with real processes and real kills.

Every run here is compared with the same run on the embedded engine: nothing may be lost and
nothing done twice.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.server.small_federation import expected, lines, start_nodes, wait_for, weights


def test_the_same_model_as_on_the_embedded_engine_with_half_the_nodes_killed(
    federation: Any,
) -> None:
    start_nodes(federation, "n1", "n2")
    federation.server("-c", "pause=0.2")
    for number in (2, 5):
        wait_for(federation, (federation.marks / f"1-{number}").exists)
        federation.kill("n2")  # in the middle of training, with its app's process
        federation.node("n2")
    assert federation.wait("server") == 0
    result = federation.result()
    assert np.array_equal(weights(result), expected(federation))
    assert [line["clients"] for line in lines(result) if line["round"]] == [2] * 10
    assert [line["train"]["steps"] for line in lines(result) if line["round"]] == [*range(1, 11)]


def kill_and_continue(federation: Any, at: Callable[[], Any], *words: str) -> dict[str, Any]:
    """A run whose server is killed at an instant, and started again."""
    (federation.folder / "server.log").write_text("")
    federation.server("-c", "pause=0.02", "--fresh", *words)
    at()
    federation.kill("server")
    if not federation.result():
        federation.server("-c", "pause=0.02")
        assert federation.wait("server") == 0, federation.log("server")
    return dict(federation.result())


def test_a_killed_server_continues_its_run(federation: Any) -> None:
    start_nodes(federation, "n1", "n2")
    model = expected(federation)

    def in_round_six() -> None:
        wait_for(federation, (federation.marks / "0-6").exists)

    result = kill_and_continue(federation, in_round_six)
    assert np.array_equal(weights(result), model)
    assert [line["round"] for line in lines(result) if line["round"]] == [*range(1, 11)]


def test_a_server_that_is_told_to_end_says_goodbye_and_continues_later(federation: Any) -> None:
    start_nodes(federation, "n1", "n2")
    server = federation.server("-c", "pause=0.3 rounds=5")
    wait_for(federation, (federation.marks / "0-3").exists)
    server.terminate()
    assert federation.wait("server") == 128 + signal.SIGTERM
    assert "the run goes on" in federation.log("server").splitlines()[-1]
    assert federation.result() == {} and "Traceback" not in federation.log("server")
    federation.server("-c", "pause=0.3 rounds=5")
    assert federation.wait("server") == 0, federation.log("server")
    result = federation.result()
    assert np.array_equal(weights(result), expected(federation, options="rounds=5"))
    assert [line["train"]["steps"] for line in lines(result) if line["round"]] == [*range(1, 6)]


def test_a_killed_server_repeats_no_round_that_it_could_save_and_names_the_others(
    federation: Any,
) -> None:
    """Rounds far below a second: each has a checkpoint as soon as saving is a twentieth of it."""
    start_nodes(federation, "n1", "n2")
    federation.server("-c", "pause=0.2 rounds=6")

    def in_round_four() -> bool:
        return bool((federation.marks / "0-4").exists())

    wait_for(federation, in_round_four)
    federation.kill("server")
    for mark in federation.marks.iterdir():
        mark.unlink()
    federation.server("-c", "pause=0.2 rounds=6")
    assert federation.wait("server") == 0, federation.log("server")
    done = {int(mark.name.split("-")[1]) for mark in federation.marks.iterdir()}
    repeated = done & {1, 2, 3}
    assert not repeated or "had ended and not been saved yet" in federation.log("server"), done
    assert 1 not in done and 2 not in done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_killed_at_twenty_random_instants_ends_with_the_same_model(
    federation: Any,
) -> None:
    start_nodes(federation, "n1", "n2")
    model = expected(federation)
    draw = random.Random(20)
    began = time.monotonic()
    kill_and_continue(federation, lambda: federation.wait("server"))
    whole = time.monotonic() - began
    for _ in range(20):
        instant = draw.uniform(0.0, whole * 1.1)

        def later(instant: float = instant) -> None:
            try:
                federation.running["server"].wait(instant)
            except subprocess.TimeoutExpired:
                return

        assert np.array_equal(weights(kill_and_continue(federation, later)), model), instant


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_federation_moves_to_flowers_engine_and_back(federation: Any) -> None:
    """No node enrols twice, and both engines end with the model of the embedded one."""
    model = expected(federation, options="rounds=2")
    start_nodes(federation, "n1", "n2")
    for engine in ("link", "flower", "link"):
        federation.server(
            "-c", "rounds=2 min-replies=2 round-timeout=1200", "--engine", engine
        )  # one is not the app's
        assert federation.wait("server", seconds=1500) == 0, federation.log("server")
        result = federation.result()
        assert result["stopped"] == "rounds" and ("flower_run" in result) == (engine == "flower")
        assert np.array_equal(weights(result), model), engine
        for name in ("n1", "n2"):
            federation.running[name].terminate()
            assert federation.wait(name) == 0
            federation.node(name, *(["--engine", "flower"] if engine == "link" else []))


def test_a_trainer_that_hangs_is_stopped_and_its_node_stays(federation: Any) -> None:
    start_nodes(federation, "n1", "n2")
    federation.server("-c", "hang=true round-timeout=5.0 rounds=9 min-replies=1")
    assert federation.wait("server") == 0
    rounds = [line for line in lines(federation.result()) if line["round"]]
    clients = [line["clients"] for line in rounds]
    assert clients[:2] == [2, 1] and clients[-1] == 2, clients
    assert "was stopped" in federation.log("n2")
    assert "not waited for any longer: n2" in federation.log("server")


class Proxy:
    """A TCP proxy that cuts connections when so many bytes have passed."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.limits: dict[str, int] = {}
        self.cuts: list[str] = []
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                shut(near)
                continue
            self._sockets.append(far)
            self._start(self._pass, "up", near, far)
            self._start(self._pass, "down", far, near)

    def _pass(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if passed > self.limits.get(way, passed):
                    del self.limits[way]
                    self.cuts.append(way)
                    break
                sink.sendall(data)
        shut(source)
        shut(sink)

    def close(self) -> None:
        for each in self._sockets:
            shut(each)
        for thread in self._threads:
            thread.join(10)
        for each in self._sockets:
            each.close()


def shut(each: socket.socket) -> None:
    """Shut both ways, so that the other thread and both ends notice."""
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def test_a_connection_cut_in_the_middle_of_a_transfer_costs_nothing(federation: Any) -> None:
    options = "size=1000000 rounds=4"
    proxy = Proxy(federation.port)
    try:
        federation.invite("n1", port=proxy.port)
        federation.invite("n2")
        proxy.limits = {"down": 6_000_000}  # in the middle of the second model
        for number, name in enumerate(("n1", "n2")):
            federation.node(name, "--node-config", f"partition-id={number} num-partitions=2")
        federation.server("-c", options)
        wait_for(federation, lambda: proxy.cuts == ["down"])
        proxy.limits = {"up": 3_000_000}  # in the middle of the next reply
        assert federation.wait("server") == 0
        assert proxy.cuts == ["down", "up"]
    finally:
        proxy.close()
    result = federation.result()
    assert np.array_equal(weights(result), expected(federation, options=options))
    assert [line["clients"] for line in lines(result) if line["round"]] == [2] * 4


SKEW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *tv, void *tz) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    tv->tv_sec = now.tv_sec;
    tv->tv_usec = now.tv_nsec / 1000;
    return 0;
}
int clock_gettime(clockid_t id, struct timespec *ts) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, ts);
    if (id == CLOCK_REALTIME) ts->tv_sec += SECONDS;
    return result;
}
"""


def test_nodes_whose_clocks_are_an_hour_off_take_part(federation: Any) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler to shift the clock of a process")
    federation.invite("n1", "n2")
    for number, (name, seconds) in enumerate((("n1", 3600), ("n2", -3600))):
        source, library = federation.folder / f"{name}.c", federation.folder / f"{name}.so"
        source.write_text(SKEW)
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-DSECONDS={seconds}", "-o", library, source, "-ldl"],
            check=True,
        )
        federation._environment["LD_PRELOAD"] = str(library)
        federation.node(name, "--node-config", f"partition-id={number} num-partitions=2")
    del federation._environment["LD_PRELOAD"]
    federation.server()
    assert federation.wait("server") == 0
    assert np.array_equal(weights(federation.result()), expected(federation))
    assert os.environ.get("LD_PRELOAD") is None
