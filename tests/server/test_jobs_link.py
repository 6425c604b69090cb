"""A coordinator that stays outlives whatever it is asked to run; with real processes."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from umbel.core.errors import ConfigError
from umbel.jobs import Jobs, jobs_in, unfinished_job
from umbel.server.link.enrolment import Enrolment


def test_jobs_that_cannot_be_run_end_themselves_and_not_the_coordinator(federation: Any) -> None:
    federation.invite("n1", "n2")
    federation.server("--serve", "-c", "rounds=1")
    for number, name in enumerate(("n1", "n2")):
        federation.node(name, "--node-config", f"partition-id={number} num-partitions=2")
    until(lambda: federation.result().get("rounds") == 1)
    refused = federation.umbel("submit", "--state", "state", "-c", "rounds=0", check=False)
    assert refused.returncode == 2 and "rounds is 0; it must be at least 1" in refused.stderr

    # a typo, a run that is stopped in its middle, one that never begins, and one to its end
    for words in ("round=3", "rounds=5000 pause=0.05", "rounds=7", "rounds=2"):
        federation.umbel("submit", "--state", "state", "-c", words)
    until(lambda: states(federation)[:2] == ["failed", "running"])
    federation.umbel("cancel", "3", "--state", "state")
    until(lambda: federation.status()["run"] and federation.status()["round"] > 2)
    before = federation.status()["run"]

    # killed in the middle of a job, it goes on with that, whatever its own options are
    federation.kill("server")
    killed = time.time()
    federation.server("--serve", "-c", "rounds=1")
    until(lambda: federation.status()["at"] > killed and federation.status()["round"] > 2)
    assert federation.status()["run"] == before
    federation.umbel("cancel", "2", "--state", "state")
    until(lambda: states(federation) == ["failed", "cancelled", "cancelled", "done"])

    listed = json.loads(federation.umbel("jobs", "--state", "state", "--json").stdout)["jobs"]
    assert "round" in listed[0]["why"] and "did you mean" in listed[0]["why"]
    assert listed[1]["run"] == before and listed[2]["run"] == ""
    until(lambda: federation.result()["run"] == listed[3]["run"])
    assert federation.result()["rounds"] == 2
    shown = federation.umbel("jobs", "--state", "state").stdout
    assert "cancelled" in shown and "rounds=2" in shown
    again = federation.umbel("cancel", "4", "--state", "state", check=False)
    assert again.returncode == 2 and "job 4 has ended before (done)" in again.stderr
    federation.running["server"].terminate()
    assert federation.wait("server", 60) == 0
    said = federation.umbel("submit", "--state", "state", "-c", "rounds=1").stdout
    assert "no coordinator runs on state" in said


def states(federation: Any) -> list[str]:
    found = json.loads(federation.umbel("jobs", "--state", "state", "--json").stdout)
    return [job["state"] for job in found["jobs"]]


def until(what: Callable[[], Any]) -> None:
    """Until it is so."""
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.2)


def test_a_job_that_was_cancelled_while_no_coordinator_ran_does_not_go_on(tmp_path: Path) -> None:
    """Its unfinished run stands in nobody's way either; a job without a run waits again."""
    with closing(Enrolment(tmp_path)) as enrolment:
        jobs = Jobs(enrolment)
        jobs.add({"rounds": 5})
        jobs.add({"rounds": 6})
        jobs.begin()
        jobs.begin()
        enrolment.keep("run", {"job": 1, "done": False})
        assert unfinished_job(enrolment, fresh=False) == jobs.of(1)
        assert jobs.of(2).state == "waiting"
        jobs.cancel(1)
        assert unfinished_job(enrolment, fresh=False) is None
        assert enrolment.fact("run")["done"]


def test_many_who_submit_at_once_lose_no_job(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    Enrolment(tmp_path).close()

    def ask(number: int) -> int:
        with jobs_in(tmp_path) as jobs:  # a connection of its own, as a process has
            return jobs.add({"seed": number}).number

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(ask, range(200)))
    assert sorted(numbers) == [*range(1, 201)]
    with jobs_in(tmp_path) as jobs:
        assert sorted(int(job.changes["seed"]) for job in jobs.all()) == [*range(200)]


def test_a_job_begins_once_and_what_has_ended_stays_so(tmp_path: Path) -> None:
    with closing(Enrolment(tmp_path)) as one, closing(Enrolment(tmp_path)) as other:
        Jobs(one).add({})
        begun = [jobs.begin() for jobs in (Jobs(one), Jobs(other))]
        assert [job and job.number for job in begun] == [1, None]
        assert Jobs(other).cancel(1).state == "running"
        Jobs(one).note(1, state="done")
        assert Jobs(one).of(1).state == "cancelled"


def test_bad_numbers_and_forms_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no coordinator's state"), jobs_in(tmp_path):
        pass
    with closing(Enrolment(tmp_path)) as enrolment:
        with pytest.raises(ConfigError, match="there is no job 7"):
            Jobs(enrolment).cancel(7)
        enrolment.keep("jobs", [{"number": 1, "changes": {}, "asked": "", "state": "lost"}])
        with pytest.raises(ConfigError, match="job 1 is 'lost'"):
            Jobs(enrolment).all()
        enrolment.keep("jobs", [{"id": 1}])
        with pytest.raises(ConfigError, match="of no known form"):
            Jobs(enrolment).all()
