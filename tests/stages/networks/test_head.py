"""The last layer of a student whose prediction type is not its teacher's."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline.errors import ManifestError
from stages.data.supply import PairSupply
from stages.diffusion.form import Form
from stages.diffusion.schedule import NoiseSchedule
from stages.methods.base import Materials, StudentTraining
from stages.methods.progressive.config import ProgressiveConfig
from stages.networks import build
from stages.networks.condition import Condition
from stages.networks.head import convert, fit
from stages.networks.pixel import PixelDiffusion
from stages.networks.stable_diffusion import StableDiffusion
from stages.networks.student import Student
from tests.support.networks import adapter_around
from tests.support.pipelines import TINY, execute, plan_of

NOISY = NoiseSchedule.stable_diffusion()
EPSILON = TINY.replace("dataset: digits", "dataset: digits\n      prediction: epsilon")
STUDENTS = """
  latents: {kind: latents, teacher: teacher, images: digits, execution: {threads: 1}}
  near:
    kind: distill
    latents: latents
    method: {name: consistency, solver_steps: 8, guidance_scale: 2.0}
    training: {steps: 2, batch_size: 8}
    execution: {threads: 1}
  fewer:
    kind: distill
    latents: latents
    method: {name: progressive, start_steps: 2, match_first: true, guidance_scale: 2.0, training_steps: {2: 3}}
    training: {steps: 2, batch_size: 8}
    execution: {threads: 1}
"""


class PerfectUNet(nn.Module):
    """The network of a perfect teacher of N(0, 1): epsilon = sigma z, v = 0, x0 = alpha z. Its last layer computes them
    from z."""

    def __init__(self, prediction):
        super().__init__()
        self.config = {"out_channels": 4}
        self.conv_out = nn.Conv2d(4, 4, 3, padding=1)
        alpha, sigma = NOISY.at(999)
        with torch.no_grad():
            factor = {"epsilon": sigma, "v_prediction": 0.0, "sample": alpha}[prediction]
            self.conv_out.weight.copy_(factor * torch.eye(4)[..., None, None] * torch.eye(3)[1].outer(torch.eye(3)[1]))
            self.conv_out.bias.zero_()

    def forward(self, z, t, condition):
        return SimpleNamespace(sample=self.conv_out(z))


def perfect_teacher(prediction, schedule=NOISY):
    teacher = adapter_around(PerfectUNet(prediction), PixelDiffusion)
    teacher.prediction, teacher.schedule = prediction, schedule
    return teacher


def noises(count=64):
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def error(student, noise):
    """Return the mean squared error to the end of the ODE of N(0, 1), which is the noise itself."""
    with torch.no_grad():
        return float((student(noise, Condition(len(noise))) - noise).square().mean())


@pytest.mark.parametrize("teacher", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("student", ["v_prediction", "sample"])
def test_an_untrained_student_is_no_worse_than_one_step_of_its_teacher(teacher, student):
    """One step of a perfect teacher of N(0, 1) gives alpha z, whose error to the end of the ODE is 0.87. An x0 student
    that knows nothing gives 0, and has the error 1. The weights of epsilon, used for v, had the error 3.7."""
    untrained = Student.from_teacher(perfect_teacher(teacher), Form(prediction=student))
    alpha, _ = NOISY.at(999)
    known = {"epsilon": 0.0, "v_prediction": 0.0, "sample": alpha}[teacher] if student == "sample" else alpha
    if (teacher, student) == ("sample", "v_prediction"):
        known = alpha + alpha * NOISY.at(999).sigma  # v = -x0 is right in pure noise alone
    assert error(untrained, noises()) == pytest.approx((1 - known) ** 2, rel=0.05)
    assert error(untrained, noises()) < 1.01


def test_a_student_of_the_teachers_prediction_type_starts_as_the_teacher():
    for prediction in ("epsilon", "v_prediction", "sample"):
        student = Student.from_teacher(perfect_teacher(prediction), Form(prediction=None))
        assert student.form.prediction == prediction
        alpha, _ = NOISY.at(999)
        torch.testing.assert_close(student(noises(), Condition(64)), alpha * noises(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("teacher", "student"), [("epsilon", "v_prediction"), ("v_prediction", "epsilon")])
def test_a_fitted_student_is_exact_if_its_features_allow_it(teacher, student):
    """Here the features are z, and the end of the ODE is linear in z. So the fit is exact, also on other noises."""
    fitted = Student.from_teacher(perfect_teacher(teacher), Form(prediction=student))
    fitted.fit_head(noises(), noises(), Condition(64), torch.zeros(64))
    others = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert error(fitted, others) < 1e-3


def test_fitting_finds_the_layer_that_made_its_targets():
    torch.manual_seed(0)
    true, layer = nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
    features = torch.randn(40, 6, 5, 4)
    fit(layer, [(features[:16], true(features[:16])), (features[16:], true(features[16:]))])
    torch.testing.assert_close(layer.weight, true.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer.bias, true.bias, atol=1e-3, rtol=1e-3)


def test_zeros_are_kept_if_a_fit_is_no_better():
    """The targets do not depend on the features. So any fit to few samples is worse than zeros on other samples."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 3, 3, padding=1)
    fit(layer, [(torch.randn(4, 6, 4, 4), torch.randn(4, 3, 4, 4))])
    assert not layer.weight.any() and not layer.bias.any()


def test_an_epsilon_student_is_refused_on_a_schedule_that_ends_in_pure_noise():
    with pytest.raises(ValueError, match="schedule: cosine ends in pure noise"):
        Form(steps=4, schedule="cosine", prediction="epsilon")
    ends_in_noise = NoiseSchedule.from_alphas_cumprod(torch.linspace(1, 0, 1001)[1:].numpy())
    with pytest.raises(ValueError, match="ends in pure noise"):
        Student.from_teacher(perfect_teacher("v_prediction", ends_in_noise), Form(prediction="epsilon"))


@pytest.fixture(scope="module")
def of_epsilon(tmp_path_factory):
    store = tmp_path_factory.mktemp("epsilon")
    return store, execute(EPSILON + STUDENTS, store)


def test_students_of_a_teacher_of_epsilon(of_epsilon):
    """A one-step student predicts v, and its last layer is fitted. A consistency student predicts epsilon, like its
    teacher. The first link of a chain learns v without halving, and the next link halves its steps."""
    store, plan = of_epsilon
    said = {
        name: json.loads((stage.artifact.folder / "student.json").read_text())
        for name, stage in plan.items()
        if stage.artifact.kind == "distill"
    }
    assert {name: about["prediction"] for name, about in said.items()} == {
        "student": "v_prediction", "near": "epsilon", "fewer/2": "v_prediction", "fewer/1": "v_prediction"
    }  # fmt: skip
    log = (store / "runs/tiny/logs/student.log").read_text()
    assert "the student's last layer is initialised by" in log and "zeros" in log
    assert not plan["fewer/2"].artifact.stage.method.halves and plan["fewer/1"].artifact.stage.method.halves
    scheduler = json.loads((plan["near"].artifact.folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon"


def test_the_first_link_learns_the_teachers_own_output(of_epsilon):
    """Its target is the guided teacher's x0 at the same point. The test computes it by hand."""
    _, plan = of_epsilon
    teacher = StableDiffusion(plan["teacher"].artifact.folder)
    config = ProgressiveConfig(start_steps=2, end_steps=2, match_first=True, guidance_scale=3.0)
    method = config.create(Materials(teacher, StudentTraining(steps=1)))
    z, i = torch.randn(2, *teacher.latent_shape), torch.tensor([1, 2])
    condition, empty = (teacher.encode_prompts([text] * 2) for text in ("a red handwritten seven", ""))
    texts = [one.tensors["text"] for one in (condition, empty)]
    wanted = []
    for row, point in enumerate(i.tolist()):
        t, (alpha, sigma) = method.student.grid.timesteps[point], method.student.grid.level(point)
        with torch.no_grad():
            with_, without = (teacher.network(z[row : row + 1], t, text[:1]).sample for text in texts)
        wanted.append((z[row : row + 1] - sigma * (without + 3 * (with_ - without))) / alpha)
    torch.testing.assert_close(method.target(z, i, condition, None).float(), torch.cat(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("teacher", "student", "factors"),
    [
        ("v_prediction", "v_prediction", (1,)),
        ("epsilon", "epsilon", (1,)),
        ("v_prediction", "sample", (-1,)),
        ("v_prediction", "epsilon", (0,)),
        ("v_prediction", "both", (-1, 1)),
        ("epsilon", "v_prediction", (0,)),
        ("epsilon", "sample", (0,)),
        ("epsilon", "both", (0, 1)),
        ("sample", "v_prediction", (-1,)),
        ("sample", "epsilon", (0,)),
        ("sample", "both", (1, 0)),
    ],
)
def test_the_last_layer_is_scaled_from_the_teachers_if_possible(teacher, student, factors):
    """In pure noise v = -x0. There, the noise cannot be computed from the output of an x0 teacher, and neither x0 nor v
    from that of an epsilon teacher."""
    unet = build.unet(4, 12, (8,))
    layer = copy.deepcopy(unet.conv_out)
    turned = convert(unet, "conv_out", teacher, student).conv_out
    assert torch.equal(turned.weight, torch.cat([factor * layer.weight for factor in factors]))
    assert torch.equal(turned.bias, torch.cat([factor * layer.bias for factor in factors]))


def test_a_fit_to_one_sample_is_skipped_and_one_to_nan_is_refused():
    layer = nn.Conv2d(6, 3, 3, padding=1)
    before = layer.weight.clone()
    fit(layer, [(torch.randn(1, 6, 4, 4), torch.randn(1, 3, 4, 4))])  # with one sample, no fit can be validated
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="not finite"):
        fit(layer, [(torch.full((4, 6, 4, 4), float("nan")), torch.randn(4, 3, 4, 4))])


def test_the_last_layer_is_fitted_to_training_pairs_of_all_sources(of_epsilon):
    _, plan = of_epsilon
    folder = plan["pairs"].artifact.folder
    supply = PairSupply([folder, folder], [None, None], 32, 8, 0)
    read = []
    supply.read = lambda indices, pairs=supply.read: read.extend(indices) or pairs(indices)
    assert len(supply.examples(50)["prompts"]) == 50 == len(set(read))
    assert not set(read) & set(supply.held) and min(read) < 64 and max(read) >= 96
    assert len({index % 10 for index in read}) == 10, "prompts repeat at a stride"
    read.clear()
    assert len(supply.examples(10**6)["prompts"]) == len(read) == supply.count == 64 + 96


def test_halving_an_epsilon_teacher_without_match_first_is_refused(of_epsilon):
    text = (
        (EPSILON + STUDENTS)
        .replace("match_first: true, ", "")
        .replace("training_steps: {2: 3}", "training_steps: {1: 3}")
    )
    with pytest.raises(
        ManifestError,
        match=r"start_steps: the network .* predicts epsilon.*set match_first: true",
    ):
        plan_of(text, of_epsilon[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("start_steps: 2, match_first: yes", "match_first: "),
        ("start_steps: 2, end_steps: 2", "nothing is halved: give fewer end_steps, or match_first: true"),
    ],
)
def test_match_first_is_checked_as_a_setting(tiny, settings, words):
    text = TINY + STUDENTS.replace("start_steps: 2, match_first: true", settings).replace(
        ", training_steps: {2: 3}", ""
    )
    with pytest.raises(ManifestError, match=words):
        plan_of(text, tiny[0])


def test_a_consistency_student_that_predicts_epsilon_needs_an_epsilon_teacher(tiny):
    text = TINY + STUDENTS.replace("name: consistency", "name: consistency, prediction: epsilon")
    with pytest.raises(
        ManifestError,
        match=r"prediction: the network .* predicts v_prediction.*leave prediction out",
    ):
        plan_of(text, tiny[0])


def test_starting_from_a_student_of_another_prediction_type_is_refused(of_epsilon):
    """If a manifest does not set the prediction type, the worker compares the types."""
    _, plan = of_epsilon
    teacher = StableDiffusion(plan["teacher"].artifact.folder)
    with pytest.raises(ValueError, match="in start_from predicts v_prediction, this one predicts epsilon"):
        Student.from_student(plan["student"].artifact.folder, teacher, Form(prediction="epsilon"))
