"""Runs whose nodes protect their own records: certificate and card from what nodes have signed."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.fakes import reply
from tests.server.test_private_run import Lab
from umbel.core.errors import CheckError, ConfigError
from umbel.privacy.budget.accounting import epsilon
from umbel.privacy.masking.keys import new_signing_key, signing_key
from umbel.server.output.report import write_report
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.certificate import sha256, signed_text
from umbel.server.private.coordinator_key import coordinator_key, sign
from umbel.server.private.seal import seal
from umbel.server.private.statements import STATEMENTS, Statements, kept, signed_of, summary_of
from umbel.server.private.verify import schema, verify
from umbel.strategies.statement import RECORD, Statement, attach, make

CLIENT = """
from flwr.clientapp import ClientApp
from task import federation
from umbel.privacy.budget.accounting import epsilon
from umbel.privacy.masking.keys import new_signing_key, signing_key
from umbel.strategies.statement import Statement, attach, make

honest = federation.client_app()
app = ClientApp()
KEYS = {}

@app.train()
def train(message, context):
    reply = honest(message, context)
    partition = str(context.node_config["partition-id"])
    kinds = dict(item.split(":") for item in str(context.run_config["bad"]).split())
    number = int(message.content["umbel"]["round"])
    kind = kinds.get(partition, "signed")
    if kind == "silent":
        return reply
    noise = 1.0 + int(partition) / 10
    spent = epsilon(noise, 0.1, 5 * number, 1e-5, interval=1e-3)
    statement = Statement(
        node=partition, unit="record", mechanism="dp-sgd", limit=None, delta=1e-5,
        epsilon=spent / 2 if kind == "liar" and number == 3 else spent, run_epsilon=spent,
        relation="add-or-remove-one", noise_multiplier=noise, sampling_rate=0.1,
        steps=5 * number if kind == "liar" else 5, norm=1.0, population="clinics", run="77",
        round=number, participations=number,
    )
    key = KEYS.setdefault(partition, signing_key(new_signing_key()))
    attach(reply.content, [make(statement, None if kind == "unsigned" else key)])
    return reply

@app.evaluate()
def evaluate(message, context):
    return honest(message, context)
"""


class Clinics(Lab):
    """The tiny app with nodes that make statements of their records' budgets."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.app / "client_app.py").write_text(CLIENT)
        pyproject = self.app / "pyproject.toml"
        pyproject.write_text(
            pyproject.read_text().replace("nodes = 20", "nodes = 4")
            + '[tool.umbel.card]\nintended-use = "Screening."\ndata = "Blood counts"\n'
            'origin = "Four clinics, 2019 to 2024"\ncontact = "data@clinic.example"\n'
        )

    def certificate(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.directory().certificate_path.read_text())
        return found


@pytest.fixture
def clinics(tmp_path: Path) -> Clinics:
    return Clinics(tmp_path)


def test_a_run_of_private_records_has_a_certificate_and_a_card(clinics: Clinics) -> None:
    result = clinics.run()
    directory = clinics.directory()
    most, least = (epsilon(noise, 0.1, 15, 1e-5, interval=1e-3) for noise in (1.0, 1.3))
    assert result["epsilon"] is None and result["record_epsilon"] == pytest.approx(most)
    assert verify(directory.path) == []
    value = clinics.certificate()
    jsonschema.validate(value, schema())
    rows = {row["node"]: row for row in value["statements"]["nodes"]}
    assert sorted(rows) == ["0", "1", "2", "3"]
    assert rows["3"]["epsilon"] == pytest.approx(least) and rows["3"]["round"] == 3
    assert value["statements"]["epsilon"] == pytest.approx(most)
    assert {row["unit"] for row in value["guarantees"]} == {"record"}
    assert value["mechanism"] is value["ledger"] is None
    card = (directory.path / "MODEL_CARD.md").read_text()
    assert "Each record (such as one patient's) at each of the 4 nodes" in card
    assert "Not a node as a whole" in card and f"epsilon {least:.4g}" in card
    assert "Screening." in card and "Four clinics, 2019 to 2024" in card
    assert "data@clinic.example" in card and "Licence: not stated" in card
    page = write_report(directory.path).read_text()
    assert "Each record (such as one patient" in page and "without differential" not in page
    assert verify(directory.path) == []


def test_the_head_of_a_card_is_yaml_whatever_its_author_wrote(clinics: Clinics) -> None:
    yaml: Any = pytest.importorskip("yaml")
    licence = 'Ours \U0001fa7a: "as is" # 1 \\ é\u200b\x9f\ue000'
    with (clinics.app / "pyproject.toml").open("a", encoding="utf-8") as more:
        more.write(f"licence = {json.dumps(licence, ensure_ascii=False)}\n")
    clinics.run(bad="2:silent", rounds=1)
    directory = clinics.directory()
    text = (directory.path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    head = yaml.safe_load(text.split("---\n")[1])
    value = clinics.certificate()
    assert head["license"] == licence and head["run"] == value["run"]
    assert head["tags"] == ["federated-learning", "differential-privacy"]
    told = [(row["against"], row["unit"], row["epsilon"], row["delta"]) for row in head["privacy"]]
    assert told == [
        (row["against"], row["unit"], float(row["epsilon"]), pytest.approx(row["delta"]))
        for row in value["guarantees"]
    ]
    assert told and all(epsilon == float("inf") for *_, epsilon, _ in told)  # a node was silent
    assert verify(directory.path) == []


def test_statements_without_a_key_are_called_that(clinics: Clinics) -> None:
    clinics.run(bad="0:unsigned 1:unsigned")
    assert [row["signed"] for row in clinics.certificate()["statements"]["nodes"]] == [
        False, False, True, True,
    ]  # fmt: skip
    assert verify(clinics.directory().path) == []
    card = (clinics.directory().path / "MODEL_CARD.md").read_text()
    assert "2 of the 4 statements are not signed" in card


def test_a_node_that_makes_no_statement_protects_nothing(clinics: Clinics) -> None:
    result = clinics.run(bad="2:silent")
    assert result["record_epsilon"] == float("inf")
    assert clinics.certificate()["statements"]["without"] == ["2"]
    assert verify(clinics.directory().path) == []
    card = (clinics.directory().path / "MODEL_CARD.md").read_text()
    assert "Nobody as a whole: 1 of the nodes replied without a statement" in card


def test_a_node_that_states_less_than_its_noise_costs_is_found(clinics: Clinics) -> None:
    clinics.run(bad="1:liar")
    (problem,) = verify(clinics.directory().path)
    assert "node '1' states epsilon" in problem and "costs" in problem


def test_a_run_in_which_nobody_says_anything_stays_as_it_was(clinics: Clinics) -> None:
    clinics.run(bad="0:silent 1:silent 2:silent 3:silent")
    assert not (clinics.directory().path / STATEMENTS).exists()
    with pytest.raises(ConfigError, match="promises no privacy"):
        verify(clinics.directory().path)


@pytest.mark.parametrize("edit", ["epsilon", "signature", "dropped", "line"])
def test_a_coordinator_that_edits_statements_is_found(clinics: Clinics, edit: str) -> None:
    clinics.run()
    path = clinics.directory().path / STATEMENTS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if edit == "epsilon":
        said = signed_of(lines[0]).statement()
        lines[0]["statement"] = replace(said, epsilon=0.01, steps=1).canonical().decode()
    elif edit == "signature":
        lines[0]["signature"] = lines[1]["signature"]
    elif edit == "dropped":
        del lines[0]
    else:
        lines[0] = {"statement": "x"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verify(clinics.directory().path)
    # and where it signs a certificate that fits what it has made of them
    value = clinics.certificate()
    try:
        value["statements"] = summary_of(clinics.directory())
    except CheckError:
        return
    for row in value["guarantees"]:
        row["epsilon"] = value["statements"]["epsilon"]
    value["files"][STATEMENTS] = sha256(path)
    del value["signature"]
    value["signature"] = sign(coordinator_key(), signed_text(value))
    clinics.directory().certificate_path.write_text(json.dumps(value))
    seal(clinics.directory())
    problems = verify(clinics.directory().path)
    if edit == "dropped":  # the coordinator's word is all there is for who took part
        assert problems == []
    else:
        assert any("is not signed with the key it names" in problem for problem in problems)


def test_the_latest_statement_of_each_node_and_unit_is_kept(tmp_path: Path) -> None:
    run = RunDirectory.create(None, "t", {}, out=tmp_path / "run")
    key = signing_key(new_signing_key())
    statement = Statement(
        node="n", unit="record", mechanism="dp-sgd", epsilon=1.0, run_epsilon=1.0, limit=None,
        delta=1e-5, relation="add-or-remove-one", noise_multiplier=9.0, sampling_rate=0.1, steps=1,
        norm=1.0, population="p", run="1", round=1, participations=1,
    )  # fmt: skip
    later = replace(statement, round=2, epsilon=1.5)
    node = replace(statement, unit="node", mechanism="local-gaussian", epsilon=4.0)
    kept_here = Statements(run, {1001: "n", 1002: "m"})
    assert not kept_here.about_records
    for said in ([make(statement, key)], [make(later, key), make(node, key)]):
        message = reply(1001)
        attach(message.content, said)
        kept_here.hear(message)
    forged = make(later, key)
    message = reply(1002)
    attach(
        message.content,
        [replace(forged, signature=bytes([forged.signature[0] ^ 1, *forged.signature[1:]]))],
    )
    kept_here.hear(message)  # a statement that its key did not sign is none
    kept_here.hear(reply(1002, error="gone"))
    kept_here.write()
    told = summary_of(run)
    assert [(row["node"], row["unit"], row["epsilon"]) for row in told["nodes"]] == [
        ("n", "node", 4.0), ("n", "record", 1.5),
    ]  # fmt: skip
    assert told["without"] == ["m"] and told["epsilon"] == float("inf")
    again = Statements(run, {1001: "n", 1002: "m"})  # the run goes on in another process
    assert again.about_records and summary_of(run) == told
    odd = reply(1002)
    odd.content[RECORD] = message.content[RECORD]
    odd.content[RECORD]["statement"] = b"{}"
    again.hear(odd)
    again.write()
    assert summary_of(run) == told
    assert base64.b64decode(kept(run)[0]["key"])
