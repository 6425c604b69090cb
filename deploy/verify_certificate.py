#!/usr/bin/env python3
"""Check an Umbel certificate without Umbel.

    python verify_certificate.py RUN [--key FILE] [--json]

One file that anyone can read; it needs numpy, dp-accounting and cryptography, and nothing of
Umbel. It checks what `umbel verify` checks: the signature, the hash of every file that the
certificate and the seal cover, the ledger's chain of hashes and its signatures, the statements of
nodes, and every epsilon again from the releases that the ledger lists.

    pip install numpy "dp-accounting>=0.6,<0.7" "cryptography>=44"

Exit status: 0 it holds, 3 it does not, 2 bad usage.
"""

import argparse
import base64
import hashlib
import json
import logging
import math
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import dp_accounting as dp
import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import rdp_privacy_accountant as rdp

FORMAT = 2
CLOSE = 2e-3
ADVERSARIES = ("model-user", "server")
COVERED = (
    "config.json",
    "metrics.jsonl",
    "nodes.jsonl",
    "model.safetensors",
    "MODEL_CARD.md",
    "statements.jsonl",
)
RELATIONS = {
    "add-or-remove-one": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": dp.NeighboringRelation.REPLACE_ONE,
    "zero-out-one": dp.NeighboringRelation.REPLACE_SPECIAL,
}
WEAKEST = ("add-or-remove-one", "zero-out-one", "replace-one")
RENYI = (*range(2, 65), 72, 80, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
SELECTION_ORDERS = (1.5, 2, 2.5, *range(3, 33), *range(34, 65, 3), 80, 96, 128, 192, 256, 512, 1024)
SHAPES = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}
ORDERS = (*(1 + x / 10 for x in range(6, 100)), *range(11, 64), 128, 256, 512, 1024)
FINE, COARSE, FEW = 1e-4, 1e-3, 24


# ---- JSON, hashes and signatures


def load(text):
    """Strict JSON: no bare infinities, no key twice."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)


def number(value):
    """A number, or the text "Infinity" that stands for one."""
    if value == "Infinity":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def unsigned(value):
    return canonical({name: part for name, part in value.items() if name != "signature"})


def signed_by(public, signature, message):
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature, validate=True), message)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of(lines):
    return hashlib.sha256(b"".join(line.encode() + b"\n" for line in lines)).hexdigest()


def same(one, other):
    if math.isinf(one) or math.isinf(other):
        return one == other
    return abs(one - other) <= CLOSE * max(abs(one), abs(other)) + 1e-9


# ---- the ledger


def read_ledger(path):
    """Bodies of the entries with their signatures, the chain of hashes checked."""
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT number, body, hash, signature FROM entry ORDER BY number"
        ).fetchall()
        members = [row[0] for row in database.execute("SELECT label FROM member ORDER BY label")]
        parts = database.execute(
            "SELECT run, node, last, times FROM participation ORDER BY node"
        ).fetchall()
    before, entries = "0" * 64, []
    for place, (at, text, hash_, signature) in enumerate(rows, start=1):
        if at != place or hashlib.sha256(f"{before}\n{text}".encode()).hexdigest() != hash_:
            raise ValueError(f"entry {place} of the ledger is not what was written there")
        before = hash_
        entries.append((json.loads(text), hash_, signature))
    return entries, members, parts


def charges_in(entries, against, run=None):
    """The releases against an adversary: (event, relation, slack) and how often."""
    found = Counter()
    for body, _, _ in entries:
        if body["kind"] != "charge" or body["against"] != against:
            continue
        if run is not None and body["run"] != run:
            continue
        event = json.dumps(body["event"], sort_keys=True)
        if body["event"]["mechanism"] == "nothing" and body["slack"] == 0:
            continue
        found[event, body["relation"], float(body["slack"])] += 1
    return found


# ---- what releases cost


def flat(charges):
    counts = Counter()
    for (event, relation, slack), times in charges.items():
        event = json.loads(event)
        while event["mechanism"] == "repeated":
            times, slack = times * event["times"], slack / event["times"]
            event = event["of"]
        counts[json.dumps(event, sort_keys=True), relation, slack] += times
    return counts


def common_relation(kinds, relations):
    if kinds & {"skellam", "concentrated"}:
        if "replace-one" in relations:
            raise ValueError("noise of many nodes cannot be added to releases under replace-one")
        return "zero-out-one"
    if "replace-one" in relations:
        if "tree" in kinds:
            raise ValueError("a tree cannot be added to releases under replace-one")
        return "replace-one"
    return "zero-out-one" if "zero-out-one" in relations else "add-or-remove-one"


def spent(charges, delta, interval=FINE, by_rdp=False):
    """(epsilon, relation) of many releases at delta, by the accountant that takes each."""
    counts = flat(charges)
    events = Counter()
    for (event, _, _), times in counts.items():
        events[event] += times
    kinds = {json.loads(event)["mechanism"] for event in events}
    relation = common_relation(kinds, {relation for _, relation, _ in counts})
    left = delta - math.fsum(slack * times for (_, _, slack), times in counts.items())
    if left <= 0 or "non-private" in kinds:
        return math.inf, relation
    parts = {}
    for event, times in events.items():
        kind = json.loads(event)["mechanism"]
        if kind == "nothing":
            continue
        part = {"sampled-without-replacement": "rdp-replace", "tree": "rdp-tree"}.get(kind, "pld")
        if kind in ("skellam", "concentrated"):
            part = "renyi"
        elif kind == "best-of-many":
            part = "rdp-selection"
        elif part == "pld" and by_rdp:
            part = "rdp-replace" if relation == "replace-one" else "rdp-tree"
        parts.setdefault(part, Counter())[event] += times
    share = left / max(1, len(parts))
    total = math.fsum(cost(part, one, relation, share, interval) for part, one in parts.items())
    return total, relation


def cost(part, events, relation, delta, interval):
    if part == "renyi":
        totals = [
            sum(times * renyi(json.loads(event), order) for event, times in events.items())
            for order in RENYI
        ]
        return float(rdp.compute_epsilon(RENYI, totals, delta)[0])
    if part == "rdp-selection":
        return by_selection(events, relation, delta)
    if part == "pld":
        return by_table(events, relation, delta, interval)
    return by_rdp(events, part == "rdp-replace", delta)


def by_rdp(events, replace, delta):
    logging.getLogger("absl").setLevel(logging.ERROR)
    accountant = rdp.RdpAccountant(ORDERS, RELATIONS["replace-one" if replace else "zero-out-one"])
    for event, times in events.items():
        accountant.compose(dp_event(json.loads(event), 2 if replace else 1), times)
    return float(accountant.get_epsilon(delta))


def by_selection(events, relation, delta):
    """The best results of random numbers of runs (Papernot and Steinke 2022, theorems 2 and 6)."""
    if relation == "replace-one":
        raise ValueError("a search cannot be added to releases under replace-one")
    total = np.zeros(len(SELECTION_ORDERS))
    for event, times in events.items():
        total += times * np.asarray(selection(json.loads(event), relation))
    return float(rdp.compute_epsilon(SELECTION_ORDERS, total, delta)[0])


def selection(event, relation):
    """Renyi divergences of one search, at SELECTION_ORDERS."""
    mean, shape = float(event["mean"]), SHAPES[event["distribution"]]
    if not (mean >= 1 and math.isfinite(mean)) or not event["of"]:
        raise ValueError("a search has at least one run, and a run has releases")
    accountant = rdp.RdpAccountant(SELECTION_ORDERS, RELATIONS[relation])
    for one in event["of"]:
        accountant.compose(dp_event(one["event"], 1), one["times"])
    curve = list(zip(SELECTION_ORDERS, accountant._rdp.tolist(), strict=True))
    if math.isinf(shape):
        more = [mean * rdp_delta(curve, math.log1p(1 / (order - 1))) for order, _ in curve]
    else:
        gamma = parameter(mean, shape)
        least = min((1 + shape) * ((1 - 1 / a) * b - math.log(gamma) / a) for a, b in curve)
        more = [least] * len(curve)
    found = [b + x + math.log(mean) / (a - 1) for (a, b), x in zip(curve, more, strict=True)]
    return list(np.minimum.accumulate(found[::-1])[::-1])


def rdp_delta(curve, epsilon):
    """Canonne, Kamath and Steinke 2020, proposition 12."""
    logs = [
        (a - 1) * (b - epsilon + math.log1p(-1 / a)) - math.log(a)
        for a, b in curve
        if math.isfinite(b)
    ]
    return math.exp(min(min(logs, default=0.0), 0.0))


def parameter(mean, shape):
    """The parameter of the truncated negative binomial distribution with this mean."""
    if mean <= 1 or shape == 1:
        return 1 / mean
    low, high = -60.0, -1e-12  # of its logarithm; the mean falls as it grows
    for _ in range(200):
        middle = (low + high) / 2
        found = math.expm1(-middle) / -middle  # the logarithmic distribution
        low, high = (middle, high) if found > mean else (low, middle)
    return math.exp((low + high) / 2)


def by_table(events, relation, delta, interval):
    """By privacy-loss distributions; by closed forms and RDP where no table would do."""
    distance = 2 if relation == "replace-one" else 1
    noise = [multiplier(json.loads(event)) for event in events]
    if None not in noise:
        losses = zip(noise, events.values(), strict=True)
        together = 1 / math.sqrt(math.fsum(n * (distance / one) ** 2 for one, n in losses))
        bound = gaussian_epsilon(together, delta)
        if all(json.loads(event)["mechanism"] == "gaussian" for event in events):
            return bound
        loss = distance / min(noise)
        hopeless = loss * (loss / 2 + 12) > 100 or delta < 1e-14
        if (hopeless or bound > 60) and distance == 1 and min(noise) >= 0.02:
            bound = min(bound, by_rdp(events, replace=False, delta=delta))
        if hopeless or bound > 60:
            return bound
    events = with_one_gaussian(events)
    total = pld.identity(value_discretization_interval=interval)
    for event, times in events.items():
        one = distribution(json.loads(event), RELATIONS[relation], interval)
        total = total.compose(one.self_compose(times) if times > 1 else one)
    return float(total.get_epsilon_for_delta(delta))


def multiplier(event):
    """The noise multiplier of a plain or Poisson-sampled Gaussian release; None for others."""
    if event["mechanism"] == "poisson-sampled":
        event = event["of"]
    return event["noise_multiplier"] if event["mechanism"] == "gaussian" else None


def gaussian_epsilon(noise, delta):
    """Epsilon of one Gaussian release (Balle and Wang 2018, theorem 8), by bisection."""
    if noise < 1e-6:
        return (0.5 / noise + math.sqrt(2 * math.log(1 / delta))) / noise

    def delta_at(epsilon):
        first = log_phi(0.5 / noise - epsilon * noise)
        second = epsilon + log_phi(-0.5 / noise - epsilon * noise)
        return max(0.0, math.exp(first) * -math.expm1(second - first))

    low, high = 0.0, 1.0
    while delta_at(high) > delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def log_phi(x):
    """The logarithm of the normal distribution function."""
    if x > -30:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -x * x / 2 - math.log(-x) - 0.5 * math.log(2 * math.pi) + math.log(series)


def with_one_gaussian(events):
    """Many plain Gaussian releases are one: their precisions add up."""
    plain = {e: n for e, n in events.items() if json.loads(e)["mechanism"] == "gaussian"}
    if not plain:
        return events
    precision = math.fsum(n / json.loads(e)["noise_multiplier"] ** 2 for e, n in plain.items())
    one = {"mechanism": "gaussian", "noise_multiplier": 1 / math.sqrt(precision)}
    return {e: n for e, n in events.items() if e not in plain} | {json.dumps(one): 1}


def renyi(event, order):
    if event["mechanism"] == "concentrated":
        return event["rho"] * order
    mu, l2, l1 = event["variance"], event["l2"], event["l1"]
    first = ((2 * order - 1) * l2**2 + 6 * l1) / (4 * mu**2)
    return order * l2**2 / (2 * mu) + min(first, 3 * l1 / (2 * mu))


def distribution(event, relation, interval):
    """The privacy-loss distribution of one release."""
    common = {"value_discretization_interval": interval, "neighboring_relation": relation}
    match event["mechanism"]:
        case "gaussian":
            return pld.from_gaussian_mechanism(event["noise_multiplier"], **common)
        case "poisson-sampled":
            return pld.from_gaussian_mechanism(
                event["of"]["noise_multiplier"], sampling_prob=event["sampling_rate"], **common
            )
        case "truncated-poisson-gaussian":
            return pld.from_truncated_subsampled_gaussian_mechanism(
                dataset_size=event["population"],
                sampling_probability=event["sampling_rate"],
                truncated_batch_size=event["cap"],
                noise_multiplier=event["noise_multiplier"],
                **common,
            )
    raise ValueError(f"{event['mechanism']!r} is not a mechanism that is accounted here")


def dp_event(event, distance):
    """An event for RDP, whose multipliers are relative to the distance of neighbours."""
    match event["mechanism"]:
        case "gaussian":
            return dp.GaussianDpEvent(event["noise_multiplier"] / distance)
        case "poisson-sampled" if distance == 1:
            return dp.PoissonSampledDpEvent(event["sampling_rate"], dp_event(event["of"], 1))
        case "repeated":
            return dp.SelfComposedDpEvent(dp_event(event["of"], distance), event["times"])
        case "tree":
            return dp.SingleEpochTreeAggregationDpEvent(event["noise_multiplier"], event["steps"])
        case "sampled-without-replacement":
            return dp.SampledWithoutReplacementDpEvent(
                event["population"], event["cohort"], dp_event(event["of"], distance)
            )
    raise ValueError(f"RDP has no bound for {event['mechanism']!r} here")


def combined(seen, central, against, delta, interval=FINE, by_rdp=False):
    """What charges against the server and against model users come to for one of them."""
    if against == "model-user":
        return spent(seen + central, delta, interval, by_rdp)
    epsilon, relation = spent(seen, delta, interval, by_rdp)
    return (math.inf if central else epsilon), relation


def in_total(seen, central, against, delta):
    """A population's whole history; kinds that no proof adds up come to infinity."""
    for by_rdp_only in (False,) if len(seen + central) <= FEW else (True, False):
        try:
            return combined(seen, central, against, delta, COARSE, by_rdp_only)
        except ValueError:
            continue
    return math.inf, "replace-one"


# ---- the checks


def problems_of(run, key):
    certificate = load((run / "certificate.json").read_bytes())
    if certificate["format"] != FORMAT:
        yield (
            f"the certificate is of format {certificate['format']!r}, and this file checks format "
            f"{FORMAT}: nothing of it was checked; check it with the Umbel that issued it"
        )
        return
    public = certificate["key"]
    if key is not None and key != public:
        yield "the certificate is signed with another key than the one given"
    if not signed_by(public, certificate["signature"], unsigned(certificate)):
        yield "the signature does not fit the certificate"
    yield from check_files(run, certificate)
    statements = read_statements(run)
    yield from check_statements(statements, certificate)
    if certificate["mechanism"] is None:
        yield from check_records(run, certificate)
        return
    entries, members, parts = read_ledger(run / certificate["ledger"]["file"])
    yield from check_ledger(entries, members, parts, certificate)
    yield from check_numbers(entries, certificate)
    yield from check_rounds(run, entries, certificate)


def check_files(run, certificate):
    said = certificate["files"]
    if said["model.safetensors"] != certificate["model"]["sha256"]:
        yield "the certificate names two models"
    for name in sorted({*said, *(name for name in COVERED if (run / name).is_file())}):
        if name not in COVERED or not (run / name).is_file():
            yield f"{name} is missing"
        elif said.get(name) != sha256(run / name):
            yield f"{name} is not what was certified"
    seal = load((run / "seal.json").read_bytes())
    if not signed_by(certificate["key"], seal["signature"], b"umbel-seal:" + unsigned(seal)):
        yield "seal.json is not signed by the coordinator"
    if seal["certificate"] != sha256(run / "certificate.json"):
        yield "seal.json is of another certificate"
    pages = [run / "result.json", run / "report.html", *run.glob("*.png")]
    found = {page.name: sha256(page) for page in pages if page.is_file()}
    for name in sorted({*found, *seal["files"]}):
        if found.get(name) != seal["files"].get(name):
            yield f"{name} is not the one that the coordinator signed"


def read_statements(run):
    path = run / "statements.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [load(line) for line in lines]


def check_statements(lines, certificate):
    told = certificate["statements"]
    if told is None:
        if lines:
            yield "the certificate says nothing of statements.jsonl"
        return
    rows, records = [], []
    for line in (line for line in lines if line.get("statement") is not None):
        body = line["statement"].encode()
        said = load(body)
        key, signature = (base64.b64decode(line[name]) for name in ("key", "signature"))
        if signature and not node_signed(key, signature, b"umbel-statement-1:" + body):
            yield f"the statement of node {line['node']!r} is not signed with the key it names"
        epsilon = math.inf if said["epsilon"] is None else number(said["epsilon"])
        if epsilon < least(said) * (1 - CLOSE) - 1e-9:
            yield f"node {line['node']!r} states less than its noise costs"
        rows.append(
            {
                "node": line["node"],
                "unit": said["unit"],
                "mechanism": said["mechanism"],
                "epsilon": "Infinity" if said["epsilon"] is None else said["epsilon"],
                "run_epsilon": "Infinity" if said["run-epsilon"] is None else said["run-epsilon"],
                "delta": said["delta"],
                "relation": said["relation"],
                "noise_multiplier": said["noise-multiplier"],
                "sampling_rate": said["sampling-rate"],
                "steps": said["steps"],
                "norm": said["norm"],
                "participations": said["participations"],
                "round": said["round"],
                "signed": bool(signature),
                "key": line["key"],
                "sha256": hashlib.sha256(body).hexdigest(),
            }
        )
        if said["unit"] == "record":
            records.append((line["node"], epsilon, said["delta"], said["relation"]))
    stated = {record[0] for record in records} or {row["node"] for row in rows}
    without = sorted({line["node"] for line in lines} - stated)
    largest = math.inf if without or not records else max(record[1] for record in records)
    if rows != told["nodes"] or without != told["without"]:
        yield "the statements of the nodes are not those of statements.jsonl"
    if not same(number(told["epsilon"]), largest):
        yield f"the statements come to epsilon {largest}, not {told['epsilon']}"
    if records and told["delta"] != max(record[2] for record in records):
        yield "the statements' largest delta is another"
    weakest = max((record[3] for record in records), key=WEAKEST.index, default=WEAKEST[0])
    if told["relation"] != weakest:
        yield f"the statements' weakest relation is {weakest}"


def node_signed(key, signature, message):
    try:
        public = serialization.load_der_public_key(key)
        if isinstance(public, ed25519.Ed25519PublicKey):
            public.verify(signature, message)
        else:
            public.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, TypeError, AttributeError):
        return False
    return True


def least(said):
    """What the reply alone that a statement was made for has cost."""
    if said["noise-multiplier"] <= 0:
        return math.inf
    event = {"mechanism": "gaussian", "noise_multiplier": said["noise-multiplier"]}
    if said["mechanism"] == "dp-sgd":
        if said["sampling-rate"] < 1:
            rate = said["sampling-rate"]
            event = {"mechanism": "poisson-sampled", "sampling_rate": rate, "of": event}
    elif said["mechanism"] != "local-gaussian":
        return 0.0
    one = Counter({(json.dumps(event, sort_keys=True), said["relation"], 0.0): said["steps"]})
    return spent(one, said["delta"])[0]


def check_records(run, certificate):
    told = certificate["statements"]
    if told is None:
        yield "there is neither a mechanism nor a statement of a node"
        return
    if certificate["provenance"] != load((run / "config.json").read_bytes()).get("provenance", []):
        yield "provenance is not what config.json says"
    if {row["against"] for row in certificate["guarantees"]} != set(ADVERSARIES):
        yield "there must be one guarantee against each adversary"
    for row in certificate["guarantees"]:
        if row["unit"] != "record" or row["relation"] != told["relation"]:
            yield f"the guarantee against {row['against']} is not of records"
        if not same(number(row["epsilon"]), number(told["epsilon"])):
            yield f"epsilon against {row['against']} is not the nodes' largest"
        if told["delta"] is not None and row["delta"] != told["delta"]:
            yield f"delta against {row['against']} is not the nodes' largest"


def check_ledger(entries, members, parts, certificate):
    said, name = certificate["ledger"], certificate["run"]
    head = (len(entries), entries[-1][1]) if entries else (0, "")
    if head != (said["entries"], said["head"]):
        yield "the ledger is longer or shorter than the certificate says, or another"
    for _, hash_, signature in entries:
        message = f"umbel ledger entry {hash_}".encode()
        if not signed_by(certificate["key"], signature, message):
            yield "an entry of the ledger is not signed with the key of the certificate"
            break
    if not entries or entries[0][0].get("population") != certificate["population"]:
        yield "the ledger is of another population"
    begun, ended, admitted = (
        [body for body, _, _ in entries if body["kind"] == kind and wanted(body, name, kind)]
        for kind in ("run", "end", "nodes")
    )
    if not begun:
        yield f"the ledger knows no run {name!r}"
        return
    for field, value in certificate["mechanism"].items():
        if begun[-1].get(field) != value:
            yield f"mechanism: {field} is {value!r}, but the ledger says {begun[-1].get(field)!r}"
    starts = [
        {"round": body["started_after"], "model": body["started_from"], "time": body["time"]}
        for body in begun
    ]
    if starts != certificate["provenance"]:
        yield "provenance: the run did not start from what the certificate says"
    if not ended or ended[-1].get("model") != certificate["model"]["sha256"]:
        yield "the ledger does not say that the run ended with this model"
    if not admitted or admitted[-1].get("members") != digest_of(members):
        yield "the ledger's list of nodes is not the one that was signed"
    own = [f"{node}\t{last}\t{times}" for run, node, last, times in parts if run == name]
    if digest_of(own) != said["participation"]:
        yield "the ledger's table of participations is not the one that was certified"


def wanted(body, run, kind):
    return kind == "nodes" or body.get("run") == run


def check_numbers(entries, certificate):
    scope = certificate["run"] if certificate["scope"] == "run" else None
    mechanism = certificate["mechanism"]
    charges = {who: charges_in(entries, who, scope) for who in ADVERSARIES}
    listed = [
        {
            "against": who,
            "event": json.loads(event),
            "relation": relation,
            "slack": slack,
            "times": times,
        }
        for who in ADVERSARIES
        for (event, relation, slack), times in charges[who].items()
    ]
    if sorted(map(canonical, listed)) != sorted(map(canonical, certificate["events"])):
        yield "the list of events is not what the ledger adds up to"
    said = {row["against"]: row for row in certificate["guarantees"]}
    total = {row["against"]: row for row in certificate["total"]}
    everything = {who: charges_in(entries, who) for who in ADVERSARIES}
    for who in ADVERSARIES:
        if who not in said or who not in total:
            yield f"there is no guarantee against {who}"
            continue
        row = said[who]
        epsilon, relation = combined(charges["server"], charges["model-user"], who, row["delta"])
        if not same(number(row["epsilon"]), epsilon):
            yield f"epsilon against {who} is {row['epsilon']}, but the ledger adds up to {epsilon}"
        sampling = mechanism["cohort"] if who == "model-user" else "known to the server"
        sampling = "not counted" if relation == "zero-out-one" else sampling
        if (row["relation"], row["unit"], row["sampling"]) != (
            relation,
            mechanism["unit"],
            sampling,
        ):
            yield f"relation, unit or sampling against {who} is not what the ledger says"
        row, delta = total[who], mechanism["delta"]
        epsilon, relation = in_total(everything["server"], everything["model-user"], who, delta)
        if not same(number(row["epsilon"]), epsilon) or row["delta"] != delta:
            yield f"the population's total against {who} is {row['epsilon']}, not {epsilon}"
        if row["relation"] != relation:
            yield f"the population's total against {who} is not of that relation"
    if mechanism["insecure"] and not math.isinf(number(said["model-user"]["epsilon"])):
        yield "the noise was seeded, so epsilon cannot be finite"


def check_rounds(run, entries, certificate):
    name, against = certificate["run"], certificate["mechanism"]["against"]
    result = run / "result.json"
    if result.is_file():
        reported = load(result.read_bytes()).get("epsilon")
        main = [row["epsilon"] for row in certificate["guarantees"] if row["against"] == against]
        if reported is not None and not (main and same(number(reported), number(main[0]))):
            yield f"result.json says epsilon {reported}, the certificate {main}"
    if against == "server":
        return
    paid = {
        body.get("round")
        for body, _, _ in entries
        if body["kind"] == "charge" and body["run"] == name
    }
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = load(text)
        if line.get("round") and "aborted" not in line and line["round"] not in paid:
            yield f"round {line['round']} is in metrics.jsonl, but the ledger has no charge for it"


def published(given):
    """The coordinator's key from a file (or the text itself), as `umbel key` prints it."""
    text = Path(given).read_text().strip() if Path(given).is_file() else given.strip()
    if text.startswith("-----BEGIN"):
        key = serialization.load_pem_public_key(text.encode())
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        text = base64.b64encode(raw).decode()
    ed25519.Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    return text


def check(run, key=None):
    """What is wrong with a run's certificate; empty if it holds. Never raises."""
    found = []
    try:
        with np.errstate(all="ignore"):
            for problem in problems_of(Path(run), key):
                found.append(problem)
    except Exception as error:
        found.append(f"it cannot be checked: {type(error).__name__}: {error}")
    return found


def main():
    parser = argparse.ArgumentParser(description="Check an Umbel certificate without Umbel.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--key", help="file with the coordinator's public key, or the key itself")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    words = parser.parse_args()
    if not (words.run / "certificate.json").is_file():
        parser.error(f"{words.run} has no certificate.json")
    try:
        key = None if words.key is None else published(words.key)
    except (OSError, ValueError) as error:
        parser.error(f"--key {words.key} is no public key of a coordinator ({error})")
    found = check(words.run, key)
    if words.json:
        known = key is not None and not found
        print(json.dumps({"ok": not found, "problems": found, "signer_known": known}))
        return 3 if found else 0
    if key is None:
        print("the signer is unknown: no --key says whose key the certificate is signed with")
    elif not found:
        print("signed by the coordinator whose key was given")
    for problem in found:
        print(f"problem: {problem}")
    print("the certificate does not hold" if found else "the certificate holds")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main())
