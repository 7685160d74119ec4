"""The standard metrics: identities on known features, torch-fidelity's own numbers, and small networks of the true
layout."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.errors import StageFailed
from stages.metrics import distances
from stages.metrics.protocols import PROTOCOLS, Protocol
from stages.networks.standard import Eyes, middle, resized
from tests.support.cli import retort
from tests.support.pipelines import TINY, execute, plan_of

# --- The numbers ---


@pytest.fixture(scope="module")
def features():
    random = np.random.default_rng(0)
    mixing = random.standard_normal((24, 24)) / 5
    real = random.standard_normal((1500, 24)) @ mixing
    return real, random.standard_normal((1200, 24)) @ mixing * 1.1 + 0.05


def test_fid_equals_torch_fidelitys(features):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(torch.from_numpy(one)) for one in features]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert distances.frechet_distance(*features) == pytest.approx(theirs, abs=1e-6)


def test_kid_equals_torch_fidelitys(features):
    from torch_fidelity.metric_kid import kid_features_to_metric

    made, real = features
    theirs = kid_features_to_metric(
        torch.from_numpy(made), torch.from_numpy(real), kid_subsets=20, kid_subset_size=300, verbose=False
    )
    ours = distances.kernel_distance_of_subsets(made, real, 20, 300)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)


def test_precision_and_recall_equal_torch_fidelitys(features):
    from torch_fidelity.metric_prc import prc_features_to_metric

    theirs = prc_features_to_metric(*map(torch.from_numpy, features[::-1]), verbose=False)  # made, then real
    assert distances.precision_recall(*features) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


# --- The networks ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained networks of the true layout: Inception and VGG-16 of full size, CLIP and DINOv2 made small."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchvision.models import vgg16
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        Dinov2Config,
        Dinov2Model,
    )

    from tests.support.networks import letters

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # the library can build its network only from weights
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        inception = FeatureExtractorInceptionV3("any", ["2048"], "none")
    torch.save(inception.state_dict(), folder / "inception.pth")
    save_file(inception.state_dict(), folder / "inception.safetensors")
    trunk = {n: t for n, t in vgg16(weights=None).state_dict().items() if n.startswith("features")}
    save_file(trunk, folder / "lpips.safetensors")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = letters("<|endoftext|>")
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    Dinov2Model(Dinov2Config(**small, image_size=224, patch_size=56)).save_pretrained(folder / "dinov2")
    return folder


def images(count=3, side=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def legacy(weights):
    return Eyes(weights, PROTOCOLS["cifar10_50k"], "cpu")


def test_inception_features_equal_torch_fidelitys(weights, legacy):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("any", ["2048"], str(weights / "inception.pth"))(images())[0]
    torch.testing.assert_close(torch.from_numpy(legacy.features(images())["inception"]), theirs, atol=1e-5, rtol=1e-4)


def test_clean_resizing_equals_pillows_on_float_channels():
    one = images(1)[0].numpy()
    wanted = [
        np.asarray(Image.fromarray(channel.astype(np.float32), "F").resize((299, 299), Image.Resampling.BICUBIC))
        for channel in one
    ]
    found = resized(torch.from_numpy(one)[None], 299, Image.Resampling.BICUBIC)[0].numpy()
    assert np.array_equal(found, np.stack(wanted).clip(0, 255))


def test_the_patch_is_the_centre_at_full_resolution(weights):
    eyes = Eyes(weights, Protocol(10, image_size=256, resize="clean", patch=True), "cpu")
    large = images(1, 320)
    changed = large.clone()
    changed[..., :10, :] = 0  # outside of the patch
    before, after = eyes.features(large), eyes.features(changed)
    assert np.array_equal(before["inception_patch"], after["inception_patch"])
    assert not np.array_equal(before["inception"], after["inception"])
    assert middle(large, 299).shape == (1, 3, 299, 299)


def test_clip_score_is_100_times_the_cosine(weights, legacy):
    scores = legacy.clip_scores(images(), ["a red seven", "a blue two", "a " * 200])
    assert scores.shape == (3,) and (scores >= 0).all() and (scores <= 100).all()
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(weights / "clip"), CLIPProcessor.from_pretrained(weights / "clip")
    given = processor(
        text=["a red seven"], images=[Image.fromarray(images()[0].permute(1, 2, 0).numpy())], return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**given).logits_per_image / model.logit_scale.exp()
    assert scores[0] == pytest.approx(max(0.0, 100 * float(logits)), abs=1e-3)
    prefixed = Eyes(weights, Protocol(10, clip_prefix="b a b "), "cpu").clip_scores(images(), ["a red seven"] * 3)
    assert prefixed[0] != scores[0]


def test_diversity_is_the_mean_over_pairs_and_0_for_equal_images(weights, legacy):
    import lpips

    same, other = images(1).repeat(3, 1, 1, 1), images(3)
    assert legacy.diversity(same) == 0
    metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    metric.net.load_state_dict(legacy._lpips.net.state_dict())
    scaled = other / 127.5 - 1
    with torch.no_grad():
        wanted = [float(metric(scaled[i : i + 1], scaled[j : j + 1])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert legacy.diversity(other) == pytest.approx(np.mean(wanted), rel=1e-5)


# --- The stages ---

MEASURED = """
  standard:
    kind: reference
    preset: cifar10_50k
    images: digits
    inception: WEIGHTS/inception.pth
    clip: WEIGHTS/clip
    dinov2: WEIGHTS/dinov2
    lpips: WEIGHTS/lpips.safetensors
    execution: {threads: 1}
  quality:
    kind: evaluate
    student: student
    reference: standard
    samples: 20
    teacher_steps: []
    execution: {threads: 1}
"""


@pytest.fixture
def few(monkeypatch):
    """Fewer images and prompts: full-size networks are slow on the CPU."""
    from stages.data.images import load as loading
    from stages.evaluate import stage
    from stages.reference import measure

    def first_ones(config, size, *, held_out=False, start=0):
        yield from (batch[:5] for batch in [next(loading.batches(config, size, held_out=held_out, start=start))])

    monkeypatch.setattr(measure, "batches", first_ones)
    monkeypatch.setattr(stage, "DIVERSITY_PROMPTS", 2)


def test_an_evaluation_has_the_standard_metrics_and_the_weights_hashes(tiny, weights, few):
    text = TINY + MEASURED.replace("WEIGHTS", str(weights))
    plan = execute(text, tiny[0], name="standard")
    metrics = plan["quality"].artifact.record["metrics"]
    for side in metrics["sides"].values():
        assert side["fid"] > 0 and side["fd_dinov2"] > 0 and 0 <= side["clip_score"] <= 100
        assert side["lpips_diversity"] > 0 and {"kid", "inception_precision", "inception_recall"} <= set(side)
        assert "patch_fid" not in side
    hashes = metrics["reference"]["weights_sha256"]
    assert set(hashes) == {"inception", "clip", "dinov2", "lpips"} and all(len(one) == 64 for one in hashes.values())
    page = (plan["quality"].artifact.folder / "index.html").read_text()
    assert "FID" in page and hashes["inception"] in page
    saved = np.load(plan["standard"].artifact.folder / "inception.npy")
    assert saved.shape == (10, 2048) == (metrics["reference"]["images"], 2048)


def test_metrics_without_weights_are_not_measured_and_listed(tiny, weights, few, write_manifest):
    text = TINY + MEASURED.replace("WEIGHTS", str(weights))
    kept = "\n".join(
        line for line in text.splitlines() if not line.strip().startswith(("inception:", "dinov2:", "lpips:"))
    )
    done = retort("plan", write_manifest(kept), "--store", tiny[0])
    said = "not measured, because the weights are not given: fid, kid, precision and recall, patch_fid (inception); "
    assert said + "fd_dinov2 (dinov2); lpips_diversity (lpips)" in done.stdout + done.stderr
    assert "cifar10_50k has 50,000 samples, this evaluation 20" in done.stdout + done.stderr
    found = execute(kept, tiny[0], name="clip_only")["quality"].artifact.record["metrics"]
    assert "clip_score" in found["sides"]["student"] and "fid" not in found["sides"]["student"]


def test_the_content_of_the_weights_decides_the_fingerprint(tiny, weights):
    text = TINY + MEASURED.replace("WEIGHTS", str(weights))
    one = plan_of(text, tiny[0])["standard"].artifact.fingerprint
    assert plan_of(text, tiny[0])["standard"].artifact.fingerprint == one
    other = text.replace("inception.pth", "inception.safetensors")  # other bytes
    assert plan_of(other, tiny[0])["standard"].artifact.fingerprint != one


@pytest.mark.parametrize(("file", "words"), [
    ("lpips.safetensors", "the inception weights are of another network"),
    ("clip/config.json", "is not a file of weights"),
])  # fmt: skip
def test_weights_of_another_network_are_refused(tiny, weights, few, file, words):
    text = TINY + MEASURED.replace("WEIGHTS/inception.pth", f"WEIGHTS/{file}").replace("WEIGHTS", str(weights))
    with pytest.raises(StageFailed, match=words):
        execute(text, tiny[0], name="wrong")


def test_a_pickle_that_runs_code_is_refused(tiny, weights, few, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    text = TINY + MEASURED.replace("WEIGHTS/inception.pth", str(tmp_path / "evil.pth")).replace("WEIGHTS", str(weights))
    with pytest.raises(StageFailed, match="is not a file of weights"):
        execute(text, tiny[0], name="evil")


def test_a_file_with_more_than_tensors_is_refused(tiny, weights, few, tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "checkpoint.pth")
    text = TINY + MEASURED.replace("WEIGHTS/inception.pth", str(tmp_path / "checkpoint.pth"))
    with pytest.raises(StageFailed, match="is not a file of weights: it holds more than the tensors of a network"):
        execute(text.replace("WEIGHTS", str(weights)), tiny[0], name="checkpoint")


def test_diversity_of_one_prompt_has_no_error(tiny, weights, few, monkeypatch):
    """Unconditional pairs have one empty prompt. The standard error of one value would be NaN."""
    from stages.evaluate import stage

    monkeypatch.setattr(stage, "DIVERSITY_PROMPTS", 1)
    text = TINY + MEASURED.replace("WEIGHTS", str(weights))
    text = "\n".join(
        line for line in text.splitlines() if not line.strip().startswith(("inception:", "dinov2:", "clip:"))
    )
    side = execute(text, tiny[0], name="one_prompt", force=["quality"])["quality"].artifact.record["metrics"]["sides"]
    assert side["student"]["lpips_diversity"] > 0 and "lpips_diversity_se" not in side["student"]
