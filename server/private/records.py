"""Runs in which every node protects its own records: certificate and card from their statements."""

from typing import Any

from umbel.server.output.rundir import RunDirectory
from umbel.server.private.certificate import issue, record_body
from umbel.server.private.coordinator_key import coordinator_key
from umbel.server.private.population import place_of, state_of
from umbel.server.private.run import run_name
from umbel.server.training_spec import Outcome
from umbel.strategies.private.options import PrivacyOptions


def certify_records(
    run: RunDirectory, outcome: Outcome, privacy: PrivacyOptions, data: object
) -> dict[str, Any]:
    """Write the certificate and the model card; what the run's result says of records.

    `epsilon` of a result is that of nodes, of which such a run promises nothing; that of records
    has names of its own.
    """
    place = place_of(privacy, run, data)
    body = record_body(run, run_name(run), place.population, privacy.delta)
    issue(run, body, coordinator_key(state_of(run)), dict(outcome.metrics))
    row = body["guarantees"][0]
    return {"record_epsilon": row["epsilon"], "record_delta": row["delta"]}
