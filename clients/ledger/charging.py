"""Between a node's answers and its ledger: what is charged, stated, kept, or answered again.

    a message comes   was it answered with a protected reply before? then the same bytes, or none
    at work           a trainer charges its records before it touches them          (`job.account`)
    before it leaves  layers with noise of the node's own are charged; what a secure sum will
                      take is held, and charged when the masked vector leaves
    beside it         a signed statement of each charge

Which ledger that is says the node's configuration: see `STATE`.
"""

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

from umbel.clients.ledger.names import COORDINATOR, DATA, IDENTITY_FILE, LEDGER, STATE
from umbel.core.contents import find_record
from umbel.core.errors import StackError
from umbel.strategies.layout import CONFIG
from umbel.strategies.policy.reading import policy_of
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.release import ChargesNode, Promise, Release
from umbel.strategies.secure.node import EXTERNAL_SESSION, IDENTITY
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts, Stateless, Transform
from umbel.transport.codec import decode, encode

if TYPE_CHECKING:  # what accounts for privacy takes a second to import
    from umbel.clients.ledger.database import Asked
    from umbel.clients.ledger.file import LedgerFile
    from umbel.clients.ledger.node_ledger import Account, Limits, Receipt
    from umbel.privacy.masking.keys import SigningKey

DEFAULT = "default"
"""What a population or data are called that nobody named."""


def answered(message: Message, context: Context) -> Message | None:
    """The reply that was given to this very message, if it was a protected one.

    The node's own records become what they were once that reply was made.

    Raises:
        GoneError: it was answered, and the reply is no longer kept.
    """
    folder = context.node_config.get(STATE)
    if not folder or not (Path(str(folder)) / LEDGER).exists():
        return None
    from umbel.clients.ledger.file import LedgerFile

    ledger, name = LedgerFile(Path(str(folder))), _name(message, context)
    if not ledger.knows(name):
        return None
    kept = ledger.answered(name, digest_of(message))
    if kept is None:
        return None
    size = int.from_bytes(kept[:8], "little")
    content, state = decode(kept[8 : 8 + size]), decode(kept[8 + size :])
    context.state.clear()
    for record in state:
        context.state[record] = state[record]
    return Message(content, reply_to=message)


def digest_of(message: Message) -> str:
    """SHA-256 of everything that a message asks."""
    parts = hashlib.sha256(message.metadata.message_type.encode() + b"\0")
    for part in encode(message.content, checksum=False):
        parts.update(part)
    return parts.hexdigest()


@dataclass
class Charging:
    """The node's ledger, for one message; nothing happens until something is charged.

    Args:
        message: that is being answered.
        context: of the node.
        options: complete.
    """

    message: Message
    context: Context
    options: Mapping[str, Any]
    receipts: "list[Receipt]" = field(default_factory=list)
    _opened: "Account | None" = None
    _ledger: "LedgerFile | None" = None
    _asked: "Asked | None" = None

    def charge(self, release: Release) -> "Receipt":
        """Charge a release that is about to happen (`umbel.clients.ledger.node_ledger.Account`)."""
        receipt = self._account().charge(release)
        self.receipts.append(receipt)
        return receipt

    def finish(
        self, content: RecordDict, releases: Sequence[Release], *, sealed: bool
    ) -> RecordDict:
        """A reply that may leave: charged, with its statements, and kept.

        Args:
            content: of the reply; statements are added.
            releases: of the layers.
            sealed: a secure sum begins, which the content is the first message of.

        Raises:
            RunError: a limit is reached, or the ledger cannot be written; nothing may leave.
        """
        if not releases and not self.receipts:
            if not self._counts_all():
                return content
            from umbel.clients.ledger.node_ledger import attendance

            releases = [attendance()]
        if sealed:
            self._hold(content, releases)
        else:
            for release in releases:
                self.charge(release)
        self._state(content)
        if self._ledger is None or self._asked is None or sealed:
            return content  # the answer to a session that begins again is a refusal, not a reply
        kept = b"".join(encode(content))
        state = b"".join(encode(self.context.state))
        whole = len(kept).to_bytes(8, "little") + kept + state
        first = self._ledger.keep(self._asked, digest_of(self.message), whole)
        if first is whole:
            return content
        size = int.from_bytes(first[:8], "little")
        return decode(first[8 : 8 + size])

    def _counts_all(self) -> bool:
        """Whether the node's owner limits participations, protected or not."""
        config = self.context.node_config
        return bool(config.get(STATE)) and policy_of(config).participations is not None

    def _hold(self, content: RecordDict, releases: Sequence[Release]) -> None:
        """Hold what the session will release; without it there is no session."""
        from umbel.strategies.secure.identity import take_session
        from umbel.strategies.secure.wire import plain_of

        ticket = plain_of(content).get("ticket")
        if not isinstance(ticket, bytes) or not releases:
            return  # the node has refused the session, or adds no noise of its own
        try:
            self.receipts += self._account().hold(ticket, releases)
        except BaseException:
            take_session(self.context)
            self.context.state.pop(EXTERNAL_SESSION, None)
            raise

    def _account(self) -> "Account":
        if self._opened is None:
            folder = self.context.node_config.get(STATE)
            if folder:
                from umbel.clients.ledger.file import LedgerFile

                self._ledger = LedgerFile(Path(str(folder)), _limits(self.context.node_config))
                self._asked = self._facts()
                self._opened = self._ledger.account(self._asked)
            else:
                from umbel.clients.ledger.node_ledger import StateLedger

                self._opened = StateLedger(self.context.state)
        return self._opened

    def _facts(self) -> "Asked":
        from umbel.clients.ledger.database import Asked

        config = self.context.node_config
        return Asked(
            run=str(self.context.run_id),
            round=_round(self.message),
            population=_population(self.options),
            data=str(config.get(DATA) or DEFAULT),
            coordinator=str(config.get(COORDINATOR, "")),
            message=_name(self.message, self.context),
            reply=secrets.token_hex(16),
        )

    # ---- statements

    def _state(self, content: RecordDict) -> None:
        """Add a signed statement of each unit's last charge."""
        from umbel.clients.ledger.node_ledger import UNPROTECTED
        from umbel.strategies import statement as statements

        protected = [r for r in self.receipts if r.release.mechanism != UNPROTECTED]
        if not protected:
            return  # or it is a session that the node itself has refused
        key, account = _key(self.context.node_config), self._account()
        latest = {receipt.release.unit: receipt for receipt in protected}
        signed = []
        for unit, receipt in sorted(latest.items(), reverse=True):
            saying = self._saying(receipt, key)
            signed.append(account.chain(unit, saying))
        statements.attach(content, signed)

    def _saying(self, receipt: "Receipt", key: "SigningKey | None") -> Callable[[str], Any]:
        from umbel.strategies.statement import Statement, make

        release, context = receipt.release, self.context

        def say(previous: str) -> Any:
            statement = Statement(
                node=str(context.node_id),
                unit=release.unit,
                mechanism=release.mechanism,
                epsilon=_finite(receipt.epsilon),
                run_epsilon=_finite(receipt.run_epsilon),
                limit=_finite(receipt.limit),
                delta=receipt.delta,
                relation=receipt.relation,
                noise_multiplier=release.noise_multiplier,
                sampling_rate=release.sampling_rate,
                steps=release.count,
                norm=release.norm,
                population=_population(self.options),
                run=str(context.run_id),
                round=_round(self.message),
                participations=receipt.participations,
                previous=previous,
            )
            return make(statement, key)

        return say


def charging_layers(stack: Stack) -> tuple[Any, ...]:
    """The layers of a stack whose noise hides the node: Umbel's, and an app's own that claim it."""
    return tuple(
        layer
        for layer in stack.layers
        if isinstance(layer, ChargesNode) or (not _is_ours(layer) and _claims(layer))
    )


def promise_of(options: Mapping[str, Any]) -> Promise:
    """What a run promises by its options, complete ones."""
    privacy = PrivacyOptions.read(options)
    budget = privacy.epsilon if math.isfinite(privacy.epsilon) else None
    return Promise(budget, privacy.delta, int(options["rounds"]))


def releases_of(
    stack: Stack,
    layers: Sequence[Any],
    config: Mapping[str, Any],
    size: int,
    promise: Promise,
) -> list[Release]:
    """What `layers` of a stack charge the node for an encoded vector of `size` coordinates."""
    found = []
    for layer in layers:
        if not isinstance(layer, ChargesNode):
            found += _claimed(stack, layer, size, promise)
            continue
        prefix = f"{layer.name}."  # type: ignore[attr-defined]  # layers have names
        own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        found.append(layer.released(own, size, promise))
    return found


def _claims(layer: Transform[Any]) -> bool:
    """Whether a layer has a claim of its own, whatever that says."""
    claim = layer.claim  # asked of the layer, because one that stands for another has it from there
    return not (isinstance(claim, MethodType) and claim.__func__ is Stateless.claim)


def _is_ours(layer: object) -> bool:
    return type(layer).__module__.startswith("umbel.strategies.")


def _claimed(stack: Stack, layer: Any, size: int, promise: Promise) -> list[Release]:
    """What an app's own layer claims against the server costs what it claims."""
    from dp_accounting import NonPrivateDpEvent

    from umbel.privacy.budget.events import Charge

    try:
        facts = stack.check(Facts(size=size, round=1), stack.init(size))
        claim = layer.claim(facts)
    except StackError:  # its noise is the coordinator's to decide, and to add
        return []
    if claim is None or claim.against != "server":
        return []
    multiplier = getattr(claim.event, "noise_multiplier", 0.0)
    open_ = isinstance(claim.event, NonPrivateDpEvent)
    return [
        Release(
            unit="record" if claim.unit == "example" else "node",
            mechanism=layer.name,
            charge=Charge(claim.event, claim.relation, claim.extra_delta),
            count=1,
            planned=promise.rounds,
            promised=math.inf if open_ else promise.epsilon,
            delta=promise.delta,
            noise_multiplier=float(multiplier),
            norm=facts.l2_bound or 0.0,
        )
    ]


def leaves(context: Context) -> None:
    """The masked vector of the session that the node keeps is about to leave: charge it.

    Raises:
        RunError: it cannot be charged; the session is gone, and nothing may leave.
    """
    from umbel.strategies.secure.identity import take_session, ticket_of

    ticket = ticket_of(context)
    if ticket is None:
        return
    try:
        folder = context.node_config.get(STATE)
        if folder:
            from umbel.clients.ledger.database import settle

            settle(Path(str(folder)), ticket)
        elif "umbel.node-ledger" in context.state:
            from umbel.clients.ledger.node_ledger import StateLedger

            StateLedger(context.state).settle(ticket)
    except BaseException:
        take_session(context)
        raise


def _limits(config: Mapping[str, Any]) -> "Limits":
    """What the node's policy allows."""
    from umbel.clients.ledger.node_ledger import Limits

    policy = policy_of(config)
    return Limits(policy.participations, policy.epsilon, policy.record_epsilon)


def _name(message: Message, context: Context) -> str:
    return f"{context.run_id}/{message.metadata.message_id}"


def _round(message: Message) -> int:
    told = find_record(message.content, CONFIG, ConfigRecord)
    number = told.get("round", 0) if told is not None else 0
    return number if isinstance(number, int) and number >= 0 else 0


def _population(options: Mapping[str, Any]) -> str:
    return str(options.get("population") or DEFAULT)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _key(config: Mapping[str, Any]) -> "SigningKey | None":
    """The key with which the node is enrolled; None for a node that is enrolled nowhere."""
    file = str(config.get(IDENTITY) or "")
    if not file and config.get(STATE):
        found = Path(str(config[STATE])) / IDENTITY_FILE
        file = str(found) if found.exists() else ""
    if not file or not all(Path(each).exists() for each in file.split(os.pathsep)):
        return None
    from umbel.strategies.secure.identity import enrolled_key

    return enrolled_key(file)
