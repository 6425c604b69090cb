"""What methods need of their place in a stack, and of the trainer."""

from umbel.core.errors import RunError, StackError
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts


def need_whole(facts: Facts, name: str) -> None:
    """Raises StackError where a method would not see what its node's training made."""
    if facts.l2_bound is not None or facts.segments or facts.modulus is not None:
        raise StackError(
            f"{name} works with what training made of the model, and it would be given what other "
            f"layers made of that; put {name} first"
        )


def steps_of(ctx: NodeContext, name: str) -> int:
    """The node's local steps.

    Raises:
        RunError: the trainer does not say them.
    """
    if ctx.steps < 1:
        raise RunError(
            f"{name} needs the number of local steps, and this app's trainer does not say it; take "
            "TorchTrainer, or return the steps (Trained.steps)"
        )
    return ctx.steps


def effective_steps(steps: int, momentum: float) -> float:
    """How many plain steps reach as far as these with momentum, under one constant gradient.

    The l1 norm of what each step's gradient adds to the update, over the learning rate (Wang et al.
    2020, https://arxiv.org/abs/2007.07481, section 3.3, for SGD with momentum).
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def check_momentum(momentum: float) -> None:
    """Raises StackError unless it is from 0 up to 1."""
    if not 0 <= momentum < 1:
        raise StackError(f"momentum is {momentum}; it must be from 0 up to 1")


def rate_of(ctx: NodeContext) -> float:
    """The learning rate of the node's steps.

    Raises:
        RunError: there is no option `learning-rate`, or it is 0.
    """
    if not ctx.learning_rate > 0:
        raise RunError(
            "the method needs the learning rate of the nodes' steps; give the app an option "
            "learning-rate above 0 and train with job.learning_rate"
        )
    return ctx.learning_rate
