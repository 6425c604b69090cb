"""Attacks on real runs of small federations: they work where nothing protects."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.benchmarks.small_task import TASK
from umbel.benchmarks.attack import scenes, training
from umbel.benchmarks.attack.defences import (
    Defence,
    clipped,
    example_rows,
    nothing,
    summed,
    with_noise,
)
from umbel.benchmarks.attack.findings import Finding
from umbel.benchmarks.attack.scenes import Task
from umbel.federation import Federation
from umbel.privacy.attacks.audit import auc_ceiling

NONE = Defence("none", "", nothing)
NOISY = Defence("noise", "", partial(with_noise, 1.0), cohort=2, unit="client", noise="server")


def find(findings: Iterable[Finding], attack: str, adversary: str, measure: str) -> Finding:
    return next(
        one
        for one in findings
        if (one.attack, one.adversary, one.measure) == (attack, adversary, measure)
    )


def test_updates_show_their_examples() -> None:
    found = scenes.pictures(Federation, TASK, NONE)
    assert find(found.findings, "closed form", "server", "PSNR in dB").value > 100
    assert find(found.findings, "iDLG labels", "server", "labels found").value == 1.0
    assert find(found.findings, "DLG", "server", "PSNR in dB").value > 20
    assert find(found.findings, "cosine + TV", "server", "PSNR in dB").value > 15
    names = {picture.attack for picture in found.pictures}
    assert names == {"closed form", "DLG", "cosine + TV"}
    assert all(picture.originals.shape == picture.guesses.shape for picture in found.pictures)


def test_clipping_hides_nothing_and_central_noise_hides_from_others_only() -> None:
    clip = scenes.pictures(Federation, TASK, Defence("clip", "", clipped))
    assert find(clip.findings, "closed form", "server", "examples recovered").value == 1.0
    noisy = scenes.pictures(Federation, TASK, NOISY)
    assert find(noisy.findings, "closed form", "other-node", "examples recovered").value == 0.0
    assert find(noisy.findings, "closed form", "server", "examples recovered").value == 1.0


def test_a_secure_sum_of_five_leaves_the_closed_form_alive() -> None:
    secure = Defence("secure sum of 5", "", summed, cohort=5, secure=True)
    found = scenes.pictures(Federation, TASK, secure)
    assert find(found.findings, "closed form", "server", "examples recovered").value > 0.5
    assert not [one for one in found.findings if one.attack == "iDLG labels"]


def test_a_malicious_model_isolates_a_batch() -> None:
    found = scenes.implant(Federation, TASK, NONE)
    # Of 64 images in 400 bins 54.7 are alone on average, with a deviation of about 4.
    recovered = find(found.findings, "imprint", "malicious-server", "examples recovered")
    assert 0.5 < recovered.value <= 1.0
    # A server that knows of the clipping makes everything but the images small.
    clip = scenes.implant(Federation, TASK, Defence("clip", "", clipped))
    recovered = find(clip.findings, "imprint", "malicious-server", "examples recovered")
    assert 0.5 < recovered.value <= 1.0


def test_noise_leaves_an_empty_image() -> None:
    noisy = Defence("noise 0.1", "", partial(with_noise, 0.1), cohort=1)
    found = scenes.pictures(Federation, replace(TASK, optimised=0), noisy)
    # Black, for models that see pixels as they are: 6.3 dB for the median of the digits.
    assert find(found.findings, "closed form", "other-node", "PSNR in dB").value < 8


def test_a_crowd_gives_away_who_and_what() -> None:
    found = scenes.crowd(Federation, TASK, NONE)
    ratio = find(found.findings, "participation: likelihood ratio", "other-node", "AUC")
    assert ratio.value > 0.6
    assert find(found.findings, "property", "server", "AUC").value > 0.9
    owners = find(found.findings, "source inference", "server", "owners found")
    assert owners.low > owners.chance


def test_memorising_hospitals_and_reference_models() -> None:
    references = [training.reference(TASK, number) for number in range(2)]
    online = [training.reference(TASK, number, online=True) for number in range(TASK.online)]
    found = training.hospitals(Federation, TASK, NONE, references, online)
    attacks = {one.attack for one in found.findings}
    assert attacks == {
        "loss threshold", "LiRA offline", "RMIA offline", "LiRA online", "RMIA online",
    }  # fmt: skip
    assert training.halves(TASK).sum(axis=0).tolist() == [TASK.online // 2] * TASK.suspects
    assert found.accuracy is not None
    assert found.accuracy[0] > 0.85
    loss = find(found.findings, "loss threshold", "model-user", "AUC")
    assert loss.value > 0.5
    assert found.members is not None
    assert found.scores["RMIA offline"].shape == found.members.shape
    again = training.hospitals(Federation, TASK, NONE, references)
    assert find(again.findings, "loss threshold", "model-user", "AUC") == loss


def test_draws_are_trainings_with_coins_of_their_own_and_count_together() -> None:
    one = training.hospitals(Federation, TASK, NOISY, [])
    two = training.hospitals(Federation, replace(TASK, draws=2), NOISY, [])
    assert one.members is not None
    assert two.members is not None
    assert len(two.members) == 2 * len(one.members)
    first, second = np.split(two.members, 2)
    assert np.array_equal(first, one.members)
    assert not np.array_equal(first, second)
    loss = find(two.findings, "loss threshold", "model-user", "AUC")
    assert loss.trials == 2 * TASK.suspects
    assert loss.high - loss.low < 0.8 * (lambda f: f.high - f.low)(
        find(one.findings, "loss threshold", "model-user", "AUC")
    )
    assert replace(TASK, draws=16).draws_of(NONE) == 2


def test_a_run_reports_accuracy_cost_and_what_it_claims() -> None:
    found = training.training(Federation, TASK, NOISY, [])
    assert found.accuracy is not None
    assert found.claimed["model-user"] > 0
    assert found.bytes_up > 4 * 64 * 32
    assert found.seconds > 0
    one = find(found.findings, "loss threshold", "model-user", "AUC")
    assert one.ceiling is not None
    assert one.ceiling >= 0.5
    assert one.excess is not None
    assert one.excess < 3


def test_example_privacy_hides_records_from_the_server_too() -> None:
    defence = example_rows([4.0])[0]
    found = training.hospitals(Federation, TASK, defence, [])
    assert found.claimed == {"model-user": 4.0, "server": 4.0}
    loss = find(found.findings, "loss threshold", "model-user", "AUC")
    assert loss.ceiling == pytest.approx(auc_ceiling(4.0, TASK.delta))
    assert loss.excess is not None
    assert loss.excess < 3
    seen = scenes.pictures(Federation, replace(TASK, optimised=0), defence)
    assert find(seen.findings, "closed form", "server", "examples recovered").value < 0.2
    lured = scenes.implant(Federation, TASK, defence)
    assert find(lured.findings, "imprint", "malicious-server", "examples recovered").value < 0.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_overfitted_to_2000_images_gives_its_members_away() -> None:
    task = Task(hospitals=1, wide=1024, wide_epochs=10, wide_rounds=15, references=2)
    references = [training.reference(task, number) for number in range(2)]
    found = training.hospitals(Federation, task, NONE, references).findings
    loss = find(found, "loss threshold", "model-user", "AUC")
    assert loss.value >= 0.6
    assert find(found, "RMIA offline", "model-user", "AUC").value >= loss.value
