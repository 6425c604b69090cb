"""What stands between a node's app and whoever asks: the node's policy, and what is always so.

    message -> kind, app, options, what will protect the update  -> refused by name, or the app
    the app's reply -> what may not leave is taken out           -> sent
    the app's exception -> its text, or its kind and place       -> sent

A node process calls it around the app that it has loaded, whatever that app is. On engines whose
process is Flower's the `ClientApp` of a federation calls it itself, at its entry: there the policy
holds for honest apps and lying coordinators; an app that is a foreign one, or was changed, can go
around it, because nothing of Umbel runs outside of the app. In either case an app is a program
that the node's owner has installed; `apps` in the policy pins which.

What is asked of a federation's app says `umbel.clients.admission`; it needs PyTorch, which a
foreign app may do without. A refusal is a reply with an error, so the node stays connected and the
coordinator's log says which key of the policy was in the way. Nothing that is refused was trained.
"""

import logging
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from umbel.core.errors import ConfigError, RunError, UmbelError, place
from umbel.core.flower import RAISED
from umbel.strategies.policy.node_policy import NodePolicy, PolicyError
from umbel.strategies.policy.reading import policy_of
from umbel.strategies.secure.wire import stage_of

if TYPE_CHECKING:
    from umbel.clients.handler import FederationClientApp
    from umbel.strategies.protection import Outlook
    from umbel.strategies.stack import Stack

log = logging.getLogger("umbel.node")

_QUERIES = {
    "umbel_hello": "hello",
    "umbel_ask": "private-mean",
    "umbel_pool": "pool",
    "umbel_statistics": "statistics",
}

_HERE = Path(__file__).resolve().parent
_PROTOCOL = (
    str(_HERE.parent / "core"),
    str(_HERE.parent / "strategies"),
    str(_HERE / "ledger"),
    *(
        str(_HERE / name)
        for name in ("handler.py", "plan.py", "received.py", "admission.py", "pooling.py")
    ),
    str(_HERE / "trainers" / "private_sgd.py"),
)
"""Where Umbel's own sentences come from that say nothing about a node's data."""


class AppError(RunError):
    """An app failed, and its own text stays on the node."""


class Known(Protocol):
    """What the gate must know of a federation's app under the options of a message."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Complete ones."""
        ...

    @property
    def stack(self) -> "Stack":
        """As these options build it."""
        ...

    @property
    def outlook(self) -> "Outlook":
        """What protects updates, as far as the stack alone tells."""
        ...

    @property
    def records(self) -> bool:
        """Whether training protects single records, with noise that nobody can repeat."""
        ...

    @property
    def quiet(self) -> bool:
        """Whether nothing may travel beside an update."""
        ...


class Guarded(Protocol):
    """A federation's own `ClientApp`, which the gate can look into."""

    @property
    def app_digest(self) -> str:
        """SHA-256 of the app's files in hex; empty where nobody has told."""
        ...

    @property
    def app_options(self) -> Mapping[str, Any] | None:
        """What options are in the app's own files, complete; None where nobody has told."""
        ...

    def known(self, context: Context) -> Known:
        """What its messages are answered with."""
        ...

    def unguarded(self, message: Message, context: Context) -> Message:
        """Its answer, behind the gate."""
        ...


def guarded(
    app: ClientApp, message: Message, context: Context, *, digest: str = "", alone: bool = False
) -> Message:
    """An app's answer, as far as the node's policy lets it.

    Args:
        app: a federation's, or a foreign one.
        message: of the coordinator.
        context: of the node; its configuration names the policy file.
        digest: of the app's files, where the caller has them and the app does not say.
        alone: the node answers for itself only, as real ones do: no pools of virtual nodes.

    Raises:
        AppError: the app failed; its own exception is the cause.
        Exception: the app's, where its text may be told.
    """
    kind = kind_of(message.metadata.message_type)
    known: Known | None = None
    policy = NodePolicy(errors="place")
    try:
        policy = _policy(context)
        federation = _of_federation(app)
        if federation is None:
            _admit_foreign(policy, kind, digest, context)
            return app(message, context)
        from umbel.clients.admission import admit, without_measures

        if kind not in ("hello", "trip"):  # a trip is of a session that was let in before
            known = federation.known(context)
            admit(policy, kind, message, federation, known, alone=alone)
        reply = federation.unguarded(message, context)
        return without_measures(reply, policy) if kind == "train" else reply
    except PolicyError as refusal:
        log.warning("refused a message (%s): policy, %s: %s", kind, refusal.key, refusal)
        reason = f"this node's policy ({refusal.key}) refuses: {refusal}"
        return Message(Error(RAISED, reason), reply_to=message)
    except Exception as error:
        if _may_tell(error, policy, known):
            raise
        said = f"{type(error).__name__} in {Path(place(error)).name}"  # folders name people
        raise AppError(f"{said}; its text stays on the node, in its log") from error


def _of_federation(app: ClientApp) -> "FederationClientApp | None":
    """The app, if it is a federation's; the module of those is there if one is."""
    home = sys.modules.get("umbel.clients.handler")
    return app if home is not None and isinstance(app, home.FederationClientApp) else None


def kind_of(message_type: str) -> str:
    """The kind of a message: one of a policy's, or `hello`, `pool`, or `trip` of a secure sum."""
    if stage_of(message_type) is not None:
        return "trip"
    category, _, action = message_type.partition(".")
    if category != "query":
        return category
    return _QUERIES.get(action, "query")


def _policy(context: Context) -> NodePolicy:
    """The node's policy; one that cannot be read refuses everything."""
    try:
        return policy_of(context.node_config)
    except ConfigError as error:
        log.error("%s; every message is refused until it can be read", error)
        raise PolicyError(
            "file", "its file cannot be read, which the node's owner sees in the node's log"
        ) from None


def _admit_foreign(policy: NodePolicy, kind: str, digest: str, context: Context) -> None:
    """Raises PolicyError where an app that is no federation's must not answer."""
    if policy.protects:
        raise PolicyError(
            next((key for key in policy.given if key not in ("answer", "apps")), "unprotected"),
            "it asks for protection, and what an app without a Federation sends nobody here can "
            "tell; run an app that is made with Federation",
        )
    policy.check_kind(kind if kind in ("train", "evaluate") else "query")
    policy.check_app(digest)
    policy.check_options(context.run_config, None)


def _may_tell(error: Exception, policy: NodePolicy, known: Known | None) -> bool:
    """Whether the text of an exception may leave the node."""
    if isinstance(error, UmbelError):
        frames = traceback.extract_tb(error.__traceback__)
        if frames and frames[-1].filename.startswith(_PROTOCOL):
            return True
    if policy.errors is not None:
        return policy.errors == "full"
    return not (policy.protects or (known is not None and known.quiet))
