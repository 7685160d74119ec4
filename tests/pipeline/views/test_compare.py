"""`retort compare`: students of several stages and runs beside their teacher, as a table, as JSON and as a page."""

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from statistics import fmean, stdev

import numpy as np
import pytest
from PIL import Image

from pipeline.store import RECORD
from stages.data.pictures import as_svg, cut
from stages.evaluate import figures as columns
from stages.reports.chart import chart, family
from stages.reports.comparison import page
from stages.reports.sections import Evaluated, Row, sections, seedless, with_means
from tests.support.cli import ROOT, retort
from tests.support.pipelines import GAUSSIAN, TINY, execute, plan_of

SHORT = "method: {name: knowledge_distillation}, training: {steps: 2, batch_size: 8}, held_out: 32"
FIRST = f"""{TINY}
  short: {{kind: distill, pairs: pairs, {SHORT}}}
  quality: {{kind: evaluate, student: student, samples: 20, teacher_steps: [2]}}
  quality_short: {{kind: evaluate, student: short, samples: 20, teacher_steps: [2, 1]}}
  teacher_alone: {{kind: evaluate, pairs: pairs, samples: 24, teacher_steps: []}}
  teacher_beside: {{kind: evaluate, pairs: pairs, samples: 20, teacher_steps: [3]}}
"""
LATER = FIRST + "  later: {kind: evaluate, student: short, samples: 22}\n"
SECOND = f"""{TINY}
  short: {{kind: distill, pairs: pairs, seed: 1, {SHORT}}}
  quality: {{kind: evaluate, student: student, samples: 20, teacher_steps: [2]}}
  quality_short: {{kind: evaluate, student: short, samples: 20, teacher_steps: []}}
"""


@pytest.fixture(scope="module")
def store(tiny):
    """Run `first` with two students, a teacher alone and an evaluation that is not made; run `second` with one of
    these students and another one."""
    execute(FIRST, tiny[0], name="first")
    execute(LATER, tiny[0], name="first", only=["quality"])
    execute(SECOND, tiny[0], name="second")
    return tiny[0]


def compare(store, folder, *arguments):
    done = retort("compare", *arguments, "--store", store, "--html", folder / "c.html", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def labels(section):
    return [(row["kind"], row["name"]) for row in section["rows"]]


TEACHER = [("teacher", f"teacher, {steps}") for steps in ("5 steps", "3 steps", "2 steps", "1 step")]


def test_every_student_of_a_run_is_a_row_below_its_teacher(store, tmp_path):
    found = compare(store, tmp_path, "first")
    students, alone = found["sections"]
    assert labels(students) == [*TEACHER, ("student", "student"), ("student", "short")]
    assert labels(alone) == TEACHER[:1]
    assert alone["shown"]["samples"] != students["shown"]["samples"]  # of the last 24 pairs, and of the last 20
    rows = {row["name"]: row["figures"] for row in students["rows"]}
    assert rows["short"]["method"] == "knowledge_distillation" and rows["short"]["training_steps"] == 2
    assert rows["student"]["training_steps"] == 24 and rows["student"]["network_calls"] == 1
    assert 0 < rows["short"]["trained_seconds"] <= rows["short"]["device_seconds"]
    assert rows["teacher, 5 steps"]["latent_mse"] == 0 < rows["short"]["latent_mse_se"]
    assert [(one["stage"], one["why"]) for one in found["not_made"]] == [("later", "waiting")]


def test_the_table_says_what_is_missing_and_where_the_page_is(store, tmp_path):
    done = retort("compare", "first", "--store", store, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "noises of pairs, teacher teacher: 20 samples" in done.stdout
    assert re.search(r"^short +knowledge_distillation +2 .*\d ± \d", done.stdout, re.MULTILINE)
    assert "not made yet: stage later of run first (waiting)" in done.stdout
    assert f"carry on with: retort resume first --store {store}\n" in done.stdout
    assert done.stdout.endswith("page: compare.html\n") and (tmp_path / "compare.html").exists()


def test_students_of_several_runs_meet_in_one_section(store, tmp_path):
    students, _ = compare(store, tmp_path, "first", "second", "first")["sections"]
    names = ["first/student", "first/short", "second/short"]
    assert labels(students) == [*TEACHER, *(("student", name) for name in names)]
    assert students["rows"][4]["note"] == "also second/student"


def test_the_images_of_a_comparison_are_stored_with_the_evaluation(store):
    from stages.data.pool import read_list
    from stages.data.reader import PairReader

    made = plan_of(FIRST, store)
    folder, pairs = made["quality"].artifact.folder, made["pairs"].artifact
    shown = json.loads((folder / "shown.json").read_text())
    assert (shown["pairs"], shown["teacher"]) == (pairs.fingerprint, made["teacher"].artifact.fingerprint)
    held_out = PairReader(read_list(pairs.folder)).batch(shown["samples"])
    assert held_out.prompts == shown["prompts"] and set(shown["samples"]) <= set(range(76, 96))
    for side in ("teacher_5", "teacher_2", "student"):
        assert Image.open(folder / "rows" / f"{side}.png").size == (16 * 16, 16)
    width, height = Image.open(folder / "grid.png").size  # at six times the native 16 pixels, and labels beside them
    assert width > 16 * 96 + 100 and height > 3 * 96


class Checked(HTMLParser):
    """A parser that fails if tags do not match. It keeps the images with their alternative texts, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            content = base64.b64decode(values["src"].removeprefix("data:image/png;base64,"), validate=True)
            self.images.append((values["alt"], np.asarray(Image.open(BytesIO(content)))))
        if tag not in ("img", "meta", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_each_image_as_it_was_stored(store, tmp_path):
    found = compare(store, tmp_path, "first")
    text = (tmp_path / "c.html").read_text()
    seen = Checked(text)
    assert "http" not in text and "<script" not in text
    rows = [row for section in found["sections"] for row in section["rows"]]
    stored = [(row, part) for row in rows if row["picture"] for part in cut(Image.open(row["picture"]), 16)]
    for (name, image), (row, part) in zip(seen.images, stored, strict=True):
        assert name.startswith(f"{row['name']}: ") and (image == np.asarray(part)).all()
    for words in (*found["sections"][0]["shown"]["prompts"], "s / image", "knowledge_distillation"):
        assert words in seen.words
    assert any("± is one standard error" in words for words in seen.words)
    assert any("stage later of run first" in words for words in seen.words)


def test_a_figure_of_chosen_rows_in_their_order(store, tmp_path):
    out = tmp_path / "f.png"
    found = compare(store, tmp_path, "first", "--figure", out)
    assert found["figure"] == str(out)
    width, height = Image.open(out).size
    assert 8 * 96 < width < 8 * 102 + 200 and 6 * 96 < height < 6 * 102 + 150
    compare(store, tmp_path, "first", "--figure", out, "--columns", "2", "--row", "short", "--row", "teacher, 5 steps")
    figure = np.asarray(Image.open(out))
    section = found["sections"][0]
    pictures = {row["name"]: row["picture"] for row in section["rows"]}
    tops = []
    for name in ("short", "teacher, 5 steps"):
        image = np.asarray(cut(Image.open(pictures[name]), 16)[0]).repeat(6, 0).repeat(6, 1)
        windows = np.lib.stride_tricks.sliding_window_view(figure, (*image.shape,))[:, :, 0]
        ((top, _),) = np.argwhere((windows == image).all((-3, -2, -1)))
        tops.append(top)
    assert tops[0] < tops[1] and figure.shape[1] < 2 * 102 + 200
    compare(store, tmp_path, "first", "--figure", out, "--columns", "2", "--row", "short as two steps of training")
    assert np.asarray(Image.open(out)).shape[0] < figure.shape[0]
    assert compare(store, tmp_path, "first")["figure"] is None


def test_a_chart_is_written_in_the_format_of_its_name(store, tmp_path):
    found = compare(store, tmp_path, "first", "--chart", tmp_path / "c.svg")
    assert found["chart"] == str(tmp_path / "c.svg") and "<svg" in (tmp_path / "c.svg").read_text()
    compare(store, tmp_path, "first", "--chart", tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size[0] > 500
    refused = retort("compare", "first", "--store", store, "--chart", tmp_path / "c.doc", cwd=tmp_path)
    assert refused.returncode == 2 and f"--chart {tmp_path / 'c.doc'} cannot be written" in refused.stderr
    refused = retort("compare", "first", "--store", store, "--chart", tmp_path / "c", cwd=tmp_path)
    assert refused.returncode == 2 and "has no suffix: give .svg, .png or .pdf" in refused.stderr


def test_comparing_imports_nothing_heavy():
    modules = "pipeline.views.compare, pipeline.views.tables, stages.reports.comparison"
    code = f"import sys, {modules}; print({{'torch', 'ray', 'numpy', 'PIL'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_comparing_nothing_exits_with_2(store, tmp_path):
    execute(GAUSSIAN, tmp_path)
    done = retort("compare", "--store", tmp_path)
    assert done.returncode == 2 and "run gaussian evaluates nothing; add a stage of `kind: evaluate`" in done.stderr
    made = execute(
        TINY + "  late: {kind: evaluate, student: student, samples: 23}\n", store, name="late", only=["pairs"]
    )
    assert not made["late"].artifact.folder.exists()
    done = retort("compare", "late", "--store", store)
    assert done.returncode == 2 and "nothing to compare yet\nnot made yet: stage late of run late" in done.stderr
    done = retort("compare", "first", "zzzz", "--store", store)
    assert done.returncode == 2 and f"no run 'zzzz' in store {store}, which has:" in done.stderr
    done = retort("compare", "first", "--store", store, "--html", tmp_path / "no" / "c.html")
    assert done.returncode == 2 and "c.html cannot be written: No such file or directory" in done.stderr
    for arguments, refusal in [
        (("--figure", tmp_path / "f.png", "--row", "none"), "rows with images:\nteacher, 5 steps\n"),
        (("--figure", tmp_path / "f.unknown"), "f.unknown cannot be written: unknown file extension: .unknown"),
        (("--row", "short"), "--row chooses the rows of a figure; give --figure FILE too"),
    ]:
        done = retort("compare", "first", "--store", store, "--html", tmp_path / "c.html", *arguments)
        assert done.returncode == 2 and refusal in done.stderr


def test_damaged_and_older_evaluations_are_listed(store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    folder = plan_of(FIRST, copy)["quality"].artifact.folder
    (folder / "rows" / "student.png").write_bytes(b"")
    found = compare(copy, tmp_path, "first")
    assert labels(found["sections"][0])[-1] == ("student", "short")
    assert "student.png is missing or changed" in found["not_made"][0]["why"]
    record = json.loads((folder / RECORD).read_text())
    record["files"] = {name: about for name, about in record["files"].items() if name == "metrics.json"}
    (folder / RECORD).write_text(json.dumps(record))
    (folder / "shown.json").unlink()
    assert "an older version of Retort" in compare(copy, tmp_path, "first")["not_made"][0]["why"]
    folder = plan_of(FIRST, copy)["quality_short"].artifact.folder
    record = json.loads((folder / RECORD).read_text())
    record["identity"]["version"] = 4
    (folder / RECORD).write_text(json.dumps(record))
    why = next(one["why"] for one in compare(copy, tmp_path, "first")["not_made"] if one["stage"] == "quality_short")
    assert "an older version of Retort" in why and "its VERSION is 4" in why


# --- Sections and means, from given figures ---


SHOWN = {"pairs": "p", "teacher": "t", "seed": 0, "samples": [1, 0], "prompts": ["a <b>cat</b>", "x & y"]}


def evaluated(folder, student, mse, **changed):
    """Make an evaluation with red images. `changed` replaces keys of metrics.json."""
    sides = {
        "teacher_20": {"network_calls": 40, "seconds_per_image": mse, "latent_mse": 0.0, "latent_mse_se": 0.0},
        "teacher_4": {"network_calls": 8, "seconds_per_image": 0.1, "latent_mse": 0.5, "latent_mse_se": 0.01},
        "student": {"network_calls": 1, "seconds_per_image": 0.1, "latent_mse": mse, "latent_mse_se": 0.01},
    }
    about = {"samples": 100, "split": "test", "dtype": "float32", "micro_batch": 64}
    metrics = {**about, "student": f"{student}-{mse}", "sides": sides, **changed}
    (folder / "rows").mkdir(exist_ok=True)
    for side in sides:
        Image.new("RGB", (16, 8), (255, 0, 0)).save(folder / "rows" / f"{side}.png")
    training = {"method": "knowledge_distillation", "training_steps": 10, "trained_seconds": 5.0}
    return Evaluated(student, training, "noises of <pairs>", folder, metrics, SHOWN)


def test_evaluations_with_different_teacher_figures_are_in_different_sections(tmp_path):
    first, same = evaluated(tmp_path, "a", 0.1), evaluated(tmp_path, "b", 0.2)
    assert len(sections([first, same])) == 1  # though the teacher's seconds differ
    others = [
        evaluated(tmp_path, "c", 0.1, samples=200),
        evaluated(tmp_path, "e", 0.1, micro_batch=8),
        evaluated(tmp_path, "f", 0.1, dtype="bfloat16"),
        evaluated(tmp_path, "d", 0.1, references={"real": {"recall": 0.5}}, features="f", distance_samples=9,
                  probe_accuracy=1.0),
        replace(same, shown={**same.shown, "samples": [0, 1]}),
        replace(same, shown={**same.shown, "teacher": "another"}),
        replace(same, metrics={**same.metrics, "sides": {**same.metrics["sides"], "teacher_4": {
            "network_calls": 8, "seconds_per_image": 0.1, "latent_mse": 0.6, "latent_mse_se": 0.01}}}),
    ]  # fmt: skip
    assert len(sections([first, same, *others])) == 8
    assert [row.name for row in sections(others[3:4])[0].rows] == ["teacher, 20 steps", "teacher, 4 steps", "real", "d"]


def test_one_student_evaluated_twice_is_one_row(tmp_path):
    one = evaluated(tmp_path, "a", 0.1)
    rows = sections([one, one, replace(one, student="other/a")])[0].rows
    assert [row.label for row in rows if row.kind == "student"] == ["a: also other/a"]


def test_students_that_differ_only_in_their_seed_get_a_mean(tmp_path):
    names = ["s[loss=l1,seed=1]", "s[loss=l2,seed=1]", "s[loss=l1,seed=2]", "s[loss=l1,seed=3]", "plain", "r[seed=1]"]
    figures = [0.1, 0.2, 0.4, 0.3, 0.9, 0.9]
    section = sections([evaluated(tmp_path, *pair) for pair in zip(names, figures, strict=True)])[0]
    labels = [row.label for row in section.rows if row.kind in ("student", "mean")]
    assert labels == [names[0], names[2], names[3], "s[loss=l1]: mean of 3 seeds", names[1], "plain", "r[seed=1]"]
    mean = next(row for row in section.rows if row.kind == "mean")
    assert mean.figures["latent_mse"] == pytest.approx(fmean([0.1, 0.4, 0.3]))
    error = stdev([0.1, 0.4, 0.3]) / 3**0.5
    assert mean.figures["latent_mse_se"] == pytest.approx(error)
    interval = [mean.figures["latent_mse_low"], mean.figures["latent_mse_high"]]
    assert interval == pytest.approx([0.8 / 3 - 4.30265 * error, 0.8 / 3 + 4.30265 * error], rel=1e-5)  # t, 2 degrees
    assert columns.words(mean.figures, "latent_mse") == ("0.2667", "± 0.0882 [-0.1128, 0.6461]")
    assert mean.figures["method"] == "knowledge_distillation" and mean.figures["network_calls"] == 1
    assert mean.picture is None and "95 % interval by Student's t" in section.legend[-1]
    assert "different only if their intervals do not overlap" in section.legend[-1]


def test_the_seed_is_removed_from_the_name_of_a_mean():
    assert seedless("s[seed=2]") == "s" and seedless("run/s[seed=2,a=1]") == "run/s[a=1]"
    assert seedless("s[a=1]") is None and seedless("seed=1") is None


def test_counts_that_differ_between_seeds_are_averaged():
    rows = [Row(f"s[seed={i}]", "student", {"training_steps": i, "method": f"m{i}"}) for i in (1, 3)]
    error, interval = 1.0, [2 - 12.7062, 2 + 12.7062]  # t of one degree of freedom
    found = list(with_means(rows))[-1].figures
    assert (found["training_steps"], found["training_steps_se"]) == (2.0, pytest.approx(error))
    assert [found["training_steps_low"], found["training_steps_high"]] == pytest.approx(interval, rel=1e-5)
    assert "method" not in found


def test_names_and_prompts_are_escaped(tmp_path):
    name = 'x"><script>alert(1)</script>'
    text = page(sections([evaluated(tmp_path, name, 0.1)]), ["<i>missing</i>"])
    seen = Checked(text)
    assert {name, "a <b>cat</b>", "x & y", "<i>missing</i>", "noises of <pairs>: 100 samples"} <= set(seen.words)
    assert "<script" not in text and [alt for alt, _ in seen.images] == [
        f"{row}: {prompt}" for row in ("teacher, 20 steps", "teacher, 4 steps", name) for prompt in SHOWN["prompts"]
    ]


def test_a_matrix_over_seeds_gets_a_mean(store, tmp_path):
    short = f"  short: {{kind: distill, pairs: pairs, matrix: {{seed: [0, 1]}}, {SHORT}}}\n"
    quality = "  quality: {kind: evaluate, student: short, samples: 20, teacher_steps: []}\n"
    execute(f"{TINY}\n{short}{quality}", store, name="sweep")
    (section,) = compare(store, tmp_path, "sweep")["sections"]
    assert labels(section) == [
        TEACHER[0], ("student", "short[seed=0]"), ("student", "short[seed=1]"), ("mean", "short")
    ]  # fmt: skip
    *_, one, two, mean = section["rows"]
    assert mean["note"] == "mean of 2 seeds"
    assert mean["figures"]["latent_mse"] == pytest.approx(fmean(row["figures"]["latent_mse"] for row in (one, two)))


def test_quality_is_drawn_against_network_calls(tmp_path):
    """The teacher and each chain have one line, and a single student is a point. Several seeds are drawn as their
    mean."""

    def figures(calls, distance, mse=0.5):
        return {"network_calls": calls, "kernel_distance": distance, "kernel_distance_se": 0.01, "latent_mse": mse}

    rows = [Row(f"teacher, {n} steps", "teacher", figures(2 * n, 0.02, 0.0), steps=n) for n in (32, 4)]
    chain = [Row(f"run/few/{n}[seed={s}]", "student", figures(n, s), steps=n) for n in (4, 1) for s in (0, 1)]
    rows += [*with_means(chain), Row("one & only", "student", figures(1, 9.0), steps=1)]
    drawn = chart(rows)
    distance, mse = drawn.axes  # of the four panels, those that have figures
    assert (distance.get_title(), mse.get_title()) == ("kernel distance", "latent MSE to teacher")
    assert distance.get_xlabel() == "network calls"
    assert (distance.get_yscale(), mse.get_yscale()) == ("log", "linear")
    lines = {one.get_label(): one.lines[0].get_xydata().tolist() for one in distance.containers}
    assert lines == {
        "one & only": [[1, 9.0]], "run/few": [[1, 0.5], [4, 0.5]], "teacher": [[8, 0.02], [64, 0.02]]
    }  # fmt: skip
    assert Checked(as_svg(drawn)).words.count("one & only") == 1
    assert chart(rows[:2]) is None
    assert chart([replace(row, figures={**row.figures, "network_calls": 1}) for row in rows]) is None
    names = ("r/few/16[w=2]", "few/16", "few[w=2,steps=16]", "few[steps=16]", "few[steps=9]")
    families = ["r/few[w=2]", "few", "few[w=2]", "few", "few[steps=9]"]
    assert [family(Row(name, "student", {}, steps=16)) for name in names] == families
