"""How runs on the link end, what is said then, and what lies there afterwards."""

import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np

from tests.server.small_federation import lines, start_nodes, wait_for, weights
from umbel.server.link.enrolment import Enrolment


def last_line(log: str) -> str:
    return log.rstrip().splitlines()[-1]


def phase(federation: Any) -> str:
    shown = federation.umbel("status", "--state", "state").stdout
    return str(next(line.split()[1] for line in shown.splitlines() if line.startswith("phase")))


def test_a_run_that_ended_is_finished_whatever_copy_of_the_database_is_put_back(
    federation: Any,
) -> None:
    for name in ("state", "n1", "n2"):
        (federation.folder / name).mkdir(mode=0o755)  # under a folder that others may read
    federation.invite("n1", "n2")
    for number, name in enumerate(("n1", "n2")):
        config = f"partition-id={number} num-partitions=2"
        words = ("--state", name, "--threads", "1", "--node-config", config)
        federation.start(name, "client", "app", "--join", f"{name}.join", *words)
    federation.server("-c", "rounds=3 pause=0.2")
    wait_for(federation, (federation.marks / "0-2").exists)
    database, copy = federation.state / "umbel.sqlite", federation.folder / "copy.sqlite"
    shutil.copy(database, copy)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256))):
        with socket.create_connection(("127.0.0.1", federation.port)) as raw:
            raw.sendall(noise)
    assert federation.wait("server") == 0
    assert phase(federation) == "finished"
    states = {node["name"]: node["state"] for node in federation.status()["nodes"]}
    assert states == {"n1": "finished", "n2": "finished"}, "they were told that the run is over"
    first = federation.result()
    log = federation.log("server")
    assert "ssl_transport_security" not in log and "Handshake failed" not in log
    open_to_others = [
        str(path)
        for folder in ("state", "n1", "n2")
        for path in (federation.folder / folder).rglob("*")
        if path.stat().st_mode & 0o077
    ]
    assert open_to_others == []

    for file in federation.state.glob("umbel.sqlite*"):
        file.unlink()
    shutil.copy(copy, database)
    federation.server("-c", "rounds=3 pause=0.2")
    assert federation.wait("server") == 0
    assert "has ended, which the database did not know yet" in federation.log("server")
    assert federation.result()["run"] == first["run"]
    assert len([*(federation.state / "runs").iterdir()]) == 1


def test_two_signals_end_a_server_at_once_and_a_revoked_node_fails_no_round(
    federation: Any,
) -> None:
    start_nodes(federation, "n1", "n2")
    options = ("-c", "rounds=12 pause=0.5 min-replies=1", "--lost-after", "5")
    server = federation.server(*options)
    wait_for(federation, (federation.marks / "0-2").exists)
    enrolment = Enrolment(federation.state)
    enrolment.revoke("n2")
    enrolment.close()
    wait_for(federation, lambda: "n2 was revoked" in federation.log("server"))
    number = int(federation.status()["round"]) + 3
    wait_for(federation, (federation.marks / f"0-{number}").exists)
    server.send_signal(signal.SIGTERM)
    server.send_signal(signal.SIGTERM)
    assert federation.wait("server") == 128 + signal.SIGTERM
    assert "Traceback" not in federation.log("server")
    federation.server(*options)
    assert federation.wait("server") == 0, federation.log("server")
    assert "asking again about every" in federation.log("n2")
    assert federation.running["n2"].poll() is None, "a revoked node asks again, slowly"
    rounds = [line for line in lines(federation.result()) if line["round"]]
    assert [line["round"] for line in rounds] == [*range(1, 13)]
    failing = [line["round"] for line in rounds if line["failed"]]
    assert len(failing) <= 1, "the round in which it was revoked, and no later one"
    assert np.isfinite(weights(federation.result())).all()


def test_an_app_of_flowers_older_interface_trains_and_one_that_only_fails_says_so(
    processes: Any,
) -> None:
    legacy = Path(__file__).parents[1] / "apps" / "legacy"
    shutil.copytree(legacy, processes.app)
    processes.invite("n1", "n2")
    for number, name in enumerate(("n1", "n2")):
        processes.node(name, "--node-config", f"partition-id={number} num-partitions=2")
    processes.server("--serve")
    wait_for(processes, processes.result)
    result = processes.result()
    assert result["rounds"] == 2 and result["metrics"]["loss"] < 1e-3, result
    processes.running["server"].terminate()
    assert processes.wait("server") == 0
    assert last_line(processes.log("server")).endswith("stopped; no run is unfinished")

    client = (processes.app / "client_app.py").read_text()
    broken = client.replace("(w,) = parameters", "raise OSError('no data here')")
    (processes.app / "client_app.py").write_text(broken)
    for name in ("n1", "n2"):
        processes.running[name].terminate()
        assert processes.wait(name) == 0
        processes.node(name)
    processes.server("--fresh")
    assert processes.wait("server") == 1
    said = last_line(processes.log("server"))
    assert "nothing was trained: all 4 replies of 2 rounds are errors" in said
    assert "no data here" in said
