"""The training loop, tested with a method of the tests: a linear student of a Gaussian teacher."""

import itertools
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.base import StageError
from stages.data.order import ShuffledOrder
from stages.training import Player, TrainingExecution, TrainingSettings, Turn, checkpoint
from stages.training.loop import train
from stages.training.players import training_progress

MEAN, STD = 0.5, 0.6


class Linear:
    """A student x = m + S z, trained by regression. With `noisy`, its loss draws from the global random generator."""

    def __init__(self, noisy: bool = False, **settings):
        torch.manual_seed(0)
        self.noisy = noisy
        module = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1 if noisy else 0.0))
        self.players = {"student": Player(module, TrainingSettings(**{"steps": 40, "batch_size": 8, **settings}))}

    def turns(self, step):
        return [Turn("student", self.loss)]

    def loss(self, batch):
        z = batch["z"] + (0.1 * torch.randn_like(batch["z"]) if self.noisy else 0.0)
        return (self.players["student"].module(z) - batch["x"]).square().mean(), {}

    def after_step(self, step):
        pass


Z = torch.linspace(-2, 2, 37)[:, None]


def batches(size=8):
    order = ShuffledOrder(len(Z), size, 3)
    return lambda step: {"z": Z[order.batch(step)], "x": MEAN + STD * Z[order.batch(step)]}


def finish(steps):
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value


def run(method, folder, size=8, every=7):
    execution = TrainingExecution(checkpoint_every=every, device="cpu")
    return train(method, batches(size), seed=1, checkpoints=folder, execution=execution)


def weights(trained):
    return {name: t.clone() for name, t in trained.averages["student"].state_dict().items()}


def test_regression_finds_the_teachers_map(tmp_path):
    trained = finish(run(Linear(steps=600, learning_rate=0.05), tmp_path))
    assert not any(module.training or module.weight.requires_grad for module in trained.averages["student"][:1])
    weight, bias = (p.item() for p in trained.averages["student"].parameters())
    assert (weight, bias) == pytest.approx((STD, MEAN), abs=1e-3)


def test_killed_at_any_step_and_resumed_the_result_has_the_same_bits(tmp_path):
    """The test drops the generator where a kill would end it: no code of the loop runs after that."""
    whole = finish(run(Linear(noisy=True), tmp_path / "whole", every=3))
    for stop in range(1, 5):
        folder = tmp_path / f"stop{stop}"
        list(itertools.islice(run(Linear(noisy=True), folder, every=3), stop))
        torch.manual_seed(stop)
        torch.randn(stop)
        again = finish(run(Linear(noisy=True), folder, every=3))
        assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(again).items())
        strip = [{k: v for k, v in line.items()} for line in again.history]
        assert strip == whole.history


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    whole = finish(run(Linear(), tmp_path / "whole"))
    list(itertools.islice(run(Linear(), tmp_path / "cut"), 2))
    newest = max((tmp_path / "cut").glob("step-*"))
    shutil.copytree(newest, tmp_path / "cut" / ".step-00000099.123")
    (tmp_path / "cut" / ".step-00000099.123" / "tensors.safetensors").write_bytes(b"cut")
    again = finish(run(Linear(), tmp_path / "cut"))
    assert all(torch.equal(a, weights(whole)[name]) for name, a in weights(again).items())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The checkpoints of a training of 40 steps that was killed after 20."""
    folder = tmp_path_factory.mktemp("kept")
    list(itertools.islice(run(Linear(noisy=True), folder, every=5), 2))
    return folder


def test_the_last_two_checkpoints_are_kept(kept):
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000010", "step-00000015"]


def test_progress_names_the_newest_checkpoint_and_its_phase(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "vae")
    assert training_progress(kept) == "checkpoint of step 15"
    assert training_progress(tmp_path) == "vae: checkpoint of step 15"
    assert training_progress(tmp_path / "nothing") is None


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


FILES = ("tensors.safetensors", "state.json", "SHA256SUMS")


@pytest.mark.parametrize("damage", [flipped, cut, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_training_resumes_from_the_previous_checkpoint_if_the_newest_is_damaged(kept, tmp_path, caplog, damage, file):
    """The result is the same as without damage, bit for bit."""
    whole = finish(run(Linear(noisy=True), tmp_path / "whole", every=5))
    folder = shutil.copytree(kept, tmp_path / "killed")
    damage(folder / "step-00000015" / file)
    again = finish(run(Linear(noisy=True), folder, every=5))
    (warning,) = caplog.messages
    assert f"{folder / 'step-00000015'} is damaged" in warning and f"from {folder / 'step-00000010'}" in warning
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
    assert again.history == whole.history


def test_a_damaged_checkpoint_is_removed_before_an_intact_one(kept, tmp_path):
    """Training resumes with another checkpoint interval. Then the newest two checkpoints are intact."""
    folder = shutil.copytree(kept, tmp_path / "killed")
    flipped(folder / "step-00000015" / "tensors.safetensors")
    list(itertools.islice(run(Linear(noisy=True), folder, every=13), 1))  # from 10 to 20: a checkpoint at 13
    assert checkpoint.newest(folder).name == "step-00000013"
    assert checkpoint.latest(folder)[1]["step"] == 13


def test_training_fails_if_all_checkpoints_are_damaged(kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "killed")
    for path in folder.iterdir():
        cut(path / "state.json")
    with pytest.raises(StageError, match=f"every checkpoint .*step-00000015.*step-00000010.*copy, or remove {folder}"):
        finish(run(Linear(noisy=True), folder))
    assert len(list(folder.iterdir())) == 2
    shutil.rmtree(folder)
    assert finish(run(Linear(noisy=True), folder)).history[0]["step"] == 10


def test_two_accumulated_halves_equal_one_batch(tmp_path):
    one = Linear(batch_size=8)
    two = Linear(batch_size=4, accumulate=2)
    a = finish(run(one, tmp_path / "one", size=8))
    b = finish(run(two, tmp_path / "two", size=4))
    for name, tensor in weights(a).items():
        torch.testing.assert_close(weights(b)[name], tensor, rtol=1e-4, atol=1e-5)


def test_each_batch_of_a_step_is_read_once_by_one_thread(tmp_path):
    class Twice(Linear):
        def turns(self, step):
            return [Turn("student", self.loss)] * 2

    read = []

    def batch(number):
        read.append((number, threading.current_thread().name))
        return {"z": Z[:4], "x": MEAN + STD * Z[:4]}

    method = Twice(steps=3, batch_size=4, accumulate=2)
    finish(train(method, batch, seed=0, checkpoints=tmp_path, execution=TrainingExecution(device="cpu")))
    numbers, threads = zip(*read, strict=True)
    assert numbers == (*range(6), 6), "one more is read ahead"
    assert len(set(threads)) == 1 and threading.current_thread().name not in threads


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    list(itertools.islice(run(Linear(), tmp_path), 2))
    other = Linear()
    player = other.players["student"]
    other.players = {"student": Player(nn.Sequential(nn.Identity(), *player.module), player.training)}
    with pytest.raises(StageError, match="another version of Retort or of a library: student/module does not fit"):
        finish(run(other, tmp_path))


def test_another_number_of_threads_gives_a_warning(tmp_path, caplog):
    list(itertools.islice(run(Linear(), tmp_path), 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    try:
        finish(run(Linear(), tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert "results will differ" in caplog.text


def test_a_loss_that_is_not_finite_stops_training_with_one_sentence(tmp_path):
    method = Linear(learning_rate=1e-3)
    method.loss = lambda batch: (method.players["student"].module(batch["z"]).sum() * float("nan"), {})
    with pytest.raises(StageError, match="the loss is nan at step 0, before the first checkpoint; lower learning_r"):
        finish(run(method, tmp_path))
    assert not list(tmp_path.glob("step-*"))


class Occasional(Linear):
    """Returns a figure only at every eighth step."""

    def turns(self, step):
        return [
            Turn("student", lambda batch: (self.loss(batch)[0], {"seen": torch.tensor(step)} if step % 8 == 0 else {}))
        ]


def test_a_figure_of_some_steps_is_logged_with_its_last_value(tmp_path):
    whole = finish(run(Occasional(), tmp_path / "whole")).history
    assert [line["seen"] for line in whole] == [8, 16, 24, 32]
    list(itertools.islice(run(Occasional(), tmp_path / "killed"), 2))
    assert finish(run(Occasional(), tmp_path / "killed")).history == whole


def test_a_gradient_that_is_not_finite_is_not_checkpointed(tmp_path):
    """The loss, a square root at 0, is finite, but its gradient is not."""
    method = Linear()
    method.loss = lambda batch: ((method.players["student"].module(batch["z"]) * 0).square().sum().sqrt(), {})
    with pytest.raises(StageError, match="the gradient norm is nan at step 0"):
        finish(run(method, tmp_path, every=1))
    assert not list(tmp_path.glob("step-*"))


class TwoPlayers:
    """Each player's loss also depends on the other player. Only the player whose turn it is may change."""

    def __init__(self, steps=1, averaged=("student", "critic")):
        settings = TrainingSettings(steps=steps, batch_size=8, learning_rate=0.1)
        self.players = {name: Player(nn.Linear(1, 1), settings, name in averaged) for name in ("student", "critic")}
        self.seen = []

    def turns(self, step):
        return [
            Turn("critic", lambda batch: self.loss("critic", batch)),
            Turn("student", lambda batch: self.loss("student", batch)),
        ]

    def loss(self, whose, batch):
        frozen = {n: [p.requires_grad for p in player.module.parameters()] for n, player in self.players.items()}
        self.seen.append((whose, {n: all(flags) for n, flags in frozen.items()}))
        both = [player.module(batch["z"]) for player in self.players.values()]
        return sum(both).square().mean(), {"size": both[0].detach().abs().mean()}

    def after_step(self, step):
        self.seen.append(("after", step))


def test_only_the_player_of_the_turn_is_trained(tmp_path):
    idle = TwoPlayers()
    idle.turns = lambda step: [Turn("critic", lambda batch: idle.loss("critic", batch))]
    before = {name: [p.clone() for p in player.module.parameters()] for name, player in idle.players.items()}
    finish(run(idle, tmp_path / "idle"))
    after = {name: list(player.module.parameters()) for name, player in idle.players.items()}
    assert all(torch.equal(a, b) for a, b in zip(before["student"], after["student"], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(before["critic"], after["critic"], strict=True))

    method = TwoPlayers()
    trained = finish(run(method, tmp_path / "both"))
    assert method.seen == [
        ("critic", {"student": False, "critic": True}),
        ("student", {"student": True, "critic": False}),
        ("after", 0),
    ]
    assert {"critic_loss", "student_loss", "student_size", "critic_gradient_norm"} <= set(trained.history[0])


class Uneven(TwoPlayers):
    """The critic has two turns in each step, the student one turn in three steps. Weights are made smaller at the end
    of each step. `left` holds the weights after each turn."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        training = TrainingSettings(batch_size=8, learning_rate=0.1, **settings)
        for name in self.players:
            self.players[name] = Player(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), training)
        self.left = {name: [self.state(name)] for name in self.players}

    def state(self, name):
        return {key: value.clone() for key, value in self.players[name].module.state_dict().items()}

    def turns(self, step):
        names = ["student"] * (step % 3 == 1) + ["critic"] * 2
        return [Turn(name, lambda batch, name=name: self.loss(name, batch)) for name in names]

    @torch.no_grad()
    def after_step(self, step):
        for player in self.players.values():
            player.module[0].weight.mul_(0.9)
        for turn in self.turns(step):
            self.left[turn.player].append(self.state(turn.player))


def test_the_average_follows_its_recurrence_over_the_players_turns(tmp_path):
    """mean <- d mean + (1 - d) value at turn n, with d = min(decay, (1 + n) / (10 + n)); 0.5 is reached at n = 8."""
    method = Uneven(steps=40, ema_decay=0.5)
    averages = finish(run(method, tmp_path)).averages
    for name, turns in {"student": 13, "critic": 80}.items():
        start, *left = method.left[name]
        assert len(left) == turns
        for key, mean in start.items():
            for n, value in enumerate((state[key] for state in left), 1):
                decay = min(0.5, (1 + n) / (10 + n)) if mean.is_floating_point() else 0  # counts are not averaged
                mean = decay * mean + (1 - decay) * value
            torch.testing.assert_close(averages[name].state_dict()[key], mean.to(value.dtype), rtol=1e-5, atol=1e-6)


def test_an_interruption_does_not_change_the_warm_up_of_the_average(tmp_path):
    whole = finish(run(Uneven(steps=30), tmp_path / "whole")).averages
    list(itertools.islice(run(Uneven(steps=30), tmp_path / "killed"), 2))  # after 20 steps; the last checkpoint: 14
    again = finish(run(Uneven(steps=30), tmp_path / "killed")).averages
    for name, average in whole.items():
        torch.testing.assert_close(again[name].state_dict(), average.state_dict(), rtol=0, atol=0)


def test_learning_rates():
    settings = TrainingSettings(steps=100, learning_rate=1.0, warmup_steps=9)
    assert settings.learning_rate_at(0) == pytest.approx(0.1)
    assert settings.learning_rate_at(50) == pytest.approx(0.5)
    assert settings.learning_rate_at(99) < 1e-3
    constant = TrainingSettings(steps=100, learning_rate=1.0, decay="constant")
    assert constant.learning_rate_at(99) == 1.0
    linear, ramp = (TrainingSettings(steps=100, learning_rate=1.0, decay=decay) for decay in ("linear", "ramp"))
    assert [linear.learning_rate_at(step) for step in (0, 50, 75)] == pytest.approx([1.0, 1.0, 0.5])
    assert [ramp.learning_rate_at(step) for step in (0, 50, 75)] == pytest.approx([1.0, 0.5, 0.25])


class Exploding(TwoPlayers):
    """The critic's loss is multiplied by `factor` at step 9 and from then on."""

    def __init__(self, factor):
        super().__init__(steps=30)
        self.factor = factor

    def turns(self, step):
        factor = self.factor if step >= 9 else 1
        return [
            Turn("student", lambda batch: (self.loss("student", batch)[0], {})),
            Turn("critic", lambda batch: (self.loss("critic", batch)[0] * factor, {})),
        ]


@pytest.mark.parametrize("factor", [float("inf"), 1e9])
@pytest.mark.parametrize("every", [4, 13])
def test_the_error_names_the_first_diverged_player_its_step_and_the_last_good_checkpoint(tmp_path, factor, every):
    """Figures are checked every ten steps. By then the student has exploded too, because it learns from the critic."""
    last = {4: "step-00000008 is the last good checkpoint", 13: "before the first checkpoint"}[every]
    with pytest.raises(StageError, match=rf"the critic loss is \S+ at step 9.*{last}"):
        finish(run(Exploding(factor), tmp_path, every=every))


def test_only_players_with_averaged_true_keep_an_average(tmp_path):
    method = TwoPlayers(averaged=("student",))
    assert set(finish(run(method, tmp_path)).averages) == {"student"}
