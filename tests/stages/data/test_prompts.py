"""Prompts from files of every format: the rows that are read, and errors that name the row."""

import csv
import json
import shutil
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ManifestError, StageFailed
from pipeline.manifest import loads
from stages.base import StageError
from stages.data.files import sha256_of, sha256_of_all
from stages.data.pool import PROMPTS, read_list
from stages.data.prompts.config import PATTERNS, Prompts
from stages.data.prompts.read import read_prompts
from stages.data.prompts.table import PromptTable, write_table
from stages.data.prompts.vocabulary import prompt_warnings
from stages.data.reader import PairReader
from stages.teacher.config import SHIPPED
from tests.support.cli import retort
from tests.support.pipelines import GAUSSIAN, execute, plan_of


def read(path, column=None) -> list[str]:
    return [text for batch in read_prompts(Prompts(path=str(path), column=column)) for text in batch]


def write(path, texts, column="prompt"):
    match path.suffix:
        case ".txt":
            path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps({"id": 1, column: t}) + "\n" for t in texts), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path, row_group_size=3)
        case ".csv":
            with open(path, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["id", column], *([1, t] for t in texts)])
    return path


one_line = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@given(texts=st.lists(one_line, min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_every_format_is_read_as_it_was_written(tmp_path_factory, suffix, texts):
    path = write(tmp_path_factory.mktemp("p") / f"p{suffix}", texts)
    assert read(path) == [
        text.removeprefix("\ufeff") if i == 0 and suffix == ".txt" else text for i, text in enumerate(texts)
    ]


def test_folders_and_globs_are_read_in_order_of_names(tmp_path):
    for name, texts in (("b.parquet", ["three"]), ("a.parquet", ["one", "two"])):
        write(tmp_path / name, texts)
    assert read(tmp_path) == read(tmp_path / "*.parquet") == ["one", "two", "three"]
    assert read(tmp_path / "b*.parquet") == ["three"]
    write(tmp_path / "c.txt", ["four"])
    with pytest.raises(StageError, match=r"files of several kinds \(.parquet, .txt\)"):
        read(tmp_path)
    with pytest.raises(StageError, match="does not exist"):
        read(tmp_path / "x*.parquet")


def test_plan_pairs_and_sample_warn_of_words_that_the_teacher_does_not_know(tmp_path, write_manifest):
    store = tmp_path / "store"
    shipped = "name: words\nstages:\n  teacher: {kind: teacher, from: digit_scenes}\n"
    teacher = execute(shipped, store)["teacher"].artifact.folder
    manifest = write_manifest(
        f"{shipped}  pairs: {{kind: pairs, teacher: teacher, prompts: {tmp_path / 'p.txt'}, count: 3, "
        "sampler: {steps: 1, guidance_scale: 1.0}}\n"
    )

    def told(*arguments):
        done = retort(*arguments, "--store", store)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if "does not know" in line]

    write(tmp_path / "p.txt", ["a zebra Cat", "A red seven", "a zebra dog", "the fourth is not used"])
    share = "does not know 4 of the 9 tokens of 3 prompts (44 %), such as 'zebra', 'Cat', 'dog';"
    (planned,), (made,) = told("plan", manifest), told("submit", manifest, "--engine", "inline")
    assert planned.startswith("warning: pairs: ") and share in planned
    assert share in made and str(teacher / "tokenizer" / "tokenizer.json") in made
    assert (store / "runs" / "words" / "logs" / "pairs.log").read_text().count(share) == 1
    draw = ("sample", teacher, "-n", 1, "--steps", 1, "-o", tmp_path / "a.png", "-p")
    (drawn,) = told(*draw, "a zebra cat")
    assert "2 of the 3 tokens" in drawn
    assert told(*draw, "a red seven") == []
    write(tmp_path / "p.txt", ["a red seven", "a blue two"])
    assert told("plan", manifest) == told("submit", manifest, "--engine", "inline") == []


def test_every_tokenizer_of_a_teacher_with_several_pipelines_is_checked(tmp_path):
    for half, name in (("host", "digits"), ("guest", "digit_scenes")):
        shutil.copytree(SHIPPED / name / "tokenizer", tmp_path / half / "tokenizer")
    guest, host = prompt_warnings(tmp_path, iter([["a handwritten seven"], ["seven above two"]]))
    assert "such as 'handwritten';" in guest and str(tmp_path / "guest") in guest
    assert "such as 'above';" in host and str(tmp_path / "host") in host


def test_a_byte_level_tokenizer_knows_every_word(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**letters, "<|endoftext|>": len(letters)}, [], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert not list(prompt_warnings(tmp_path, [["a purple cat", "ein Käfer 🐞"]]))


def test_prompts_that_the_encoder_truncates_are_counted(tmp_path):
    """Tests the tokenizer files that transformers writes today, and those of the published pipelines."""
    from transformers import CLIPTokenizer

    letters = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(letters)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(tmp_path / "new" / "tokenizer")
    old = tmp_path / "old" / "tokenizer"
    old.mkdir(parents=True)
    (old / "vocab.json").write_text(json.dumps(vocabulary))
    (old / "merges.txt").write_text("#version: 0.2\n")
    (old / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    for folder in (tmp_path / "new", tmp_path / "old"):
        prompts = [["a " * 75, "a b"], ["a " * 76, "ab " * 100]]
        (text,) = prompt_warnings(folder, prompts)
        assert text.startswith("2 of 4 prompts are longer than the 77 tokens") and "the longest has 202" in text
        assert not list(prompt_warnings(folder, prompts[:1]))


def test_csv_fields_can_contain_commas_and_line_breaks(tmp_path):
    assert read(write(tmp_path / "p.csv", ["a, b", 'say "x"', "two\nlines"])) == ["a, b", 'say "x"', "two\nlines"]


def test_a_named_column(tmp_path):
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = write(tmp_path / f"p{suffix}", ["a cat"], column="caption")
        assert read(path, "caption") == ["a cat"]
        with pytest.raises(StageError, match=r"no column 'prompt'; it has: id, caption. Name one with prompts.column"):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "p.txt: empty; expected at least one prompt"),
        ("p.txt", b"a\n\nb\n", "p.txt, line 2: empty; expected a prompt"),
        ("p.txt", b"a\n\xff\n", "p.txt, line 2: not UTF-8"),
        ("p.csv", b"", "p.csv: empty"),
        ("p.csv", b"prompt\n", "p.csv: empty"),
        ("p.csv", b"id,prompt\n1,a\n2\n", "p.csv, row 2: null; expected text"),
        ("p.csv", b"id,prompt\n1,a\n2,  \n", "p.csv, row 2: empty"),
        ("p.csv", b'prompt\na\n"b\n', "p.csv, line 3: not CSV"),
        ("p.csv", b"prompt\na\n\xe9\n", "p.csv, line 3: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', "p.jsonl, row 2: null; expected text"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl, row 2: int 3; expected text"),
        ("p.jsonl", b'{"prompt": "a"}\n{"x": 1}\n', "p.jsonl, row 2: no column 'prompt'; it has: x"),
        ("p.jsonl", b'{"prompt": "a"}\n[1]\n', "p.jsonl, row 2: expected an object with 'prompt'"),
        ("p.jsonl", b"{", "p.jsonl, row 1: not JSON"),
        ("p.parquet", b"PAR1", "p.parquet: cannot be read as parquet"),
    ],
)
def test_errors_name_the_file_and_the_row(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError, match=words):
        read(tmp_path / name)


def test_nulls_and_wrong_types_in_parquet_columns_are_errors(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", None, "c"]}), tmp_path / "p.parquet")
    with pytest.raises(StageError, match=r"p.parquet, row 2: null; expected text"):
        read(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "p.parquet")
    with pytest.raises(StageError, match=r"column 'prompt' is int64; expected text"):
        read(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == ["a", "b", "a"]


def test_many_prompts_are_never_in_memory_at_once(tmp_path):
    path = tmp_path / "p.txt"
    with open(path, "w") as file:
        file.writelines(f"{i} {'a rather long prompt ' * 10}\n" for i in range(100_000))
    tracemalloc.start()
    write_table(Prompts(path=str(path)), {"prompts.path": f"sha256:{sha256_of(path)}"}, tmp_path / PROMPTS)
    table = PromptTable(tmp_path)
    assert len(table) == 100_000 and table.of([100_001])[0].startswith("1 a rather")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def test_no_table_is_written_if_a_file_changed_since_the_plan(tmp_path):
    path = write(tmp_path / "p.txt", ["a"])
    with pytest.raises(StageError, match=r"changed since the run was planned"):
        write_table(Prompts(path=str(path)), {"prompts.path": "sha256:other"}, tmp_path / PROMPTS)
    assert list(tmp_path.iterdir()) == [path]


def test_sample_i_uses_prompt_i_mod_p_in_every_format(tmp_path):
    made = []
    for suffix in (".parquet", ".jsonl"):
        path = write(tmp_path / f"p{suffix}", ["one", "two", "three"])
        text = GAUSSIAN.replace("prompts: digits", f"prompts: {{path: {path}, column: prompt}}")
        pairs = execute(text, tmp_path / "store")["pairs"].artifact
        made.append(PairReader(read_list(pairs.folder)).batch(range(40)).prompts)
    assert made[0] == made[1] == [["one", "two", "three"][i % 3] for i in range(40)]


def test_an_invalid_prompts_file_stops_the_stage_before_solving(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\na cat\n\n  \n")
    with pytest.raises(StageFailed, match=r"p.csv, row 3: empty; expected a prompt"):
        execute(GAUSSIAN.replace("prompts: digits", f"prompts: {path}"), tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.tar"))


def test_the_content_of_a_folder_decides_the_fingerprint(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    write(folder / "a.jsonl", ["x"])
    text = GAUSSIAN.replace("prompts: digits", f"prompts: {folder}")
    before = plan_of(text, tmp_path / "store")["pairs"].artifact.fingerprint
    (folder / "notes.md").write_text("not read, so it does not count")
    assert plan_of(text, tmp_path / "store")["pairs"].artifact.fingerprint == before
    write(folder / "b.jsonl", ["y"])
    assert plan_of(text, tmp_path / "store")["pairs"].artifact.fingerprint != before
    assert sha256_of_all(str(folder), PATTERNS) == sha256_of_all(f"{folder}/*.jsonl", PATTERNS)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("words.doc", "prompts are digits, digit_scenes, or .txt, .csv, .jsonl, .parquet files"),
        ("{path: p.txt, column: x}", "only .csv, .jsonl and .parquet files have a column"),
        ("{path: p.txt, images: digits}", "give either path or images"),
        ("{images: {name: digit_scene}}", "did you mean 'digit_scenes'"),
        ("{images: {name: digits, sizes: 3}}", "unknown key; did you mean 'size'"),
    ],
)
def test_contradictory_settings_are_errors_of_the_manifest(prompts, words):
    with pytest.raises(ManifestError, match=words):
        loads(GAUSSIAN.replace("prompts: digits", f"prompts: {prompts}"), "m.yaml")


def test_text_that_utf8_cannot_encode_is_an_error(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "x\\ud83d"}\n')
    with pytest.raises(StageError, match=r"p.jsonl, row 2: cannot be encoded as UTF-8"):
        read(path)


def test_a_folder_can_have_a_dot_in_its_name(tmp_path):
    folder = tmp_path / "laion-2.5"
    folder.mkdir()
    write(folder / "a.parquet", ["x"])
    assert read(folder) == ["x"]
