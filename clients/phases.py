"""Local trainings that are more than one: phases that follow each other, and a model of one's own.

    phases   each begins where the one before ended; the update is the way of all together
    tuning   before its own model is judged, a node trains the common one a little more

Which they are, a layer says (`umbel.strategies.objective`); each is a training like any other.
"""

from dataclasses import replace

from umbel.clients.plan import Plan
from umbel.clients.received import Received
from umbel.clients.trainers.base import Job, Options, Trained, Weights
from umbel.strategies.objective import Correction, Phase
from umbel.strategies.stack import own_context

TUNING_SEED = 1 << 40
"""Sets the shuffles of tuning apart from those of rounds."""


def train_in_phases(plan: Plan, task: Received) -> Trained:
    """What a node's trainings of one round make, one after the other."""
    if not plan.stack.phases:
        return plan.trainer.train(task.weights, task.split.train, task.job)
    correction = task.job.correction or Correction()
    if correction.strength and correction.anchor is None:  # of the round, not of a phase
        correction = replace(correction, anchor=task.vector)
    weights, steps = task.weights, 0
    for place, phase in enumerate(plan.stack.phases):
        job = in_phase(task.job, phase, place)
        job = replace(job, correction=replace(correction, trains=phase.trains))
        trained = plan.trainer.train(weights, task.split.train, job)
        weights, steps = trained.weights, steps + trained.steps
    return replace(trained, steps=steps)


def tuned(plan: Plan, task: Received) -> Weights:
    """The node's own model, where layers have it trained before it is judged; it is remembered."""
    weights = task.weights
    for place, layer in enumerate(plan.stack.tuned):
        job = in_phase(task.job, layer.tuning(), TUNING_SEED + place)
        weights = plan.trainer.train(weights, task.split.train, job).weights
        ctx = own_context(plan.told(task), layer.name, task.context.state)
        layer.keep(plan.manifest.flatten(weights.parameters), ctx)
    return weights


def in_phase(job: Job, phase: Phase, place: int) -> Job:
    """The job of one training of several, which shuffles by itself."""
    options: Options = {**job.options, **phase.options}
    rate = phase.options.get("learning-rate", job.learning_rate)
    correction = None if phase.trains is None else Correction(trains=phase.trains)
    return replace(
        job,
        seed=job.seed ^ place,
        options=options,
        learning_rate=None if rate is None else float(rate),
        correction=correction,
    )
