"""Corpus and evaluation on a tiny pipeline, from the command down to the figures."""

import json
import lzma
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
import torch

from decoding.cycle import Decoder
from decoding.modes import MODES
from decoding.scheduler import Scheduler
from decoding.sequence import Sequence
from decoding.sources import ORIGINS
from engines.build_directory import BuildDirectory
from export import checkpoints
from export.build import build
from export.config import load
from export.prompts import Prompt, PromptError, read_prompts
from tests import shared, tiny
from training import corpus, evaluate, report
from training.corpus import Answer, read_corpus, temperature_of
from training.features import Features
from training.prompts import without_overlap
from training.replay import Record

QUESTIONS = ["the quick brown fox", "größer 日本語 🎉", "one two three", "x"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = shared.copied(tmp_path_factory)
    file = root / "pipeline.yaml"
    prompts = root / "prompts.jsonl"
    lines = [{"id": f"q/{i}", "task": "ab"[i % 2], "turns": [text]} for i, text in enumerate(QUESTIONS)]
    lines[2]["turns"].append("and more?")
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file.write_text(
        file.read_text() + f"training: {{prompts: [{prompts}], corpus: {root}/corpus.jsonl, target_layer_ids: [0, 2]}}\n"
    )
    build(load(file), root / "build")
    return root


def test_the_corpus_is_the_targets_answers_and_goes_on_after_a_kill(pipeline, capsys):
    command = [str(pipeline / "pipeline.yaml"), "--tokens", "12", "--slots", "3", "--build", str(pipeline / "alone")]
    assert corpus.main(command) == 0
    path = pipeline / "corpus.jsonl"
    answers = {answer.id: answer for answer in read_corpus(path)}
    assert set(answers) == {f"q/{i}" for i in range(len(QUESTIONS))} | {"q/2#1"}
    tokenizer, model = tiny.tokenizer(), tiny.target()
    for name, answer in answers.items():
        turns = [{"role": "user", "content": QUESTIONS[int(name[2])]}]
        if name == "q/2#1":
            said = tokenizer.decode(answers["q/2"].response_ids, skip_special_tokens=True)
            turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "and more?"}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert answer.prompt_ids == tokenizer(chat, add_special_tokens=False)["input_ids"]
        assert answer.temperature == temperature_of(name)
        if answer.temperature == 0:
            ids = torch.tensor([answer.prompt_ids])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
            assert out[0, ids.shape[1] :].tolist() == answer.response_ids
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote
    assert corpus.main(command) == 0
    assert {a.id: a for a in read_corpus(path)} == answers
    assert "2 answers in" in capsys.readouterr().out


class Echo:
    """An answerer that says the last token of each prompt three times, two prompts at a time."""

    tokenizer = tiny.tokenizer()

    def answer(self, asked, tokens):
        for pair in zip_longest(*[iter(asked)] * 2):
            yield from (replace(a, response_ids=a.prompt_ids[-1:] * 3) for a in reversed(pair) if a)


def test_a_corpus_cut_at_any_byte_loses_one_answer_at_most(tmp_path):
    prompts = [Prompt("a", "t", ("the quick", "brown")), Prompt("b", "t", ("größer",)), Prompt("c", "t", ("日本語", "x", "y"))]
    whole = tmp_path / "whole.jsonl"
    corpus.extend(whole, Echo(), prompts, 8)
    data, answers = whole.read_bytes(), {answer.id: answer for answer in read_corpus(whole)}
    assert set(answers) == {"a", "a#1", "b", "c", "c#1", "c#2"}
    for cut in range(len(data) - 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        kept = data[:cut].count(b"\n")
        assert len(read_corpus(path)) == kept
        corpus.extend(path, Echo(), prompts, 8)
        assert path.read_bytes().startswith(b"".join(data.splitlines(keepends=True)[:kept]))
        assert {answer.id: answer for answer in read_corpus(path)} == answers


def test_a_packed_corpus_is_read_and_does_not_grow(tmp_path, capsys):
    line = json.dumps({"id": "a", "task": "t", "prompt_ids": [1], "response_ids": [2, 3], "temperature": 0.0})
    path = tmp_path / "corpus.jsonl.xz"
    packed = lzma.compress((line + "\n").encode() * 3)
    path.write_bytes(packed)
    assert read_corpus(path) == [Answer("a", "t", [1], [2, 3], 0.0)] * 3
    for broken in (packed[:-20], b"nothing of the kind"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"corpus.jsonl.xz: cannot be unpacked"):
            read_corpus(path)
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"target: {{checkpoint: nowhere}}\ntraining: {{corpus: {path}}}\n")
    assert corpus.main([str(pipeline)]) == 1
    assert "found a packed corpus, allowed: a file that can grow; name one by --output" in capsys.readouterr().err


def test_invented_prompts_are_kept(pipeline):
    command = [str(pipeline / "pipeline.yaml"), "--tokens", "4", "--invent", "24", "--build", str(pipeline / "alone")]
    output = pipeline / "invented" / "corpus.jsonl"
    assert corpus.main([*command, "--output", str(output)]) == 0
    kept = output.with_suffix(".invented.jsonl")
    before = kept.read_text()
    prompts = read_prompts([kept])
    assert len({prompt.turns for prompt in prompts}) == len(prompts)
    assert len(read_corpus(output)) <= len(prompts) + len(QUESTIONS) + 1  # one has two turns
    assert corpus.main([*command, "--output", str(output)]) == 0
    assert kept.read_text().startswith(before)


def test_a_pipeline_without_prompts_says_what_to_do(pipeline, tmp_path, capsys):
    file = tmp_path / "pipeline.yaml"
    file.write_text((pipeline / "pipeline.yaml").read_text().split("training:")[0])
    assert corpus.main([str(file)]) == 1
    assert "training.prompts names no file; name some, or let the target --invent N prompts" in capsys.readouterr().err


def test_prompts_that_overlap_the_evaluation_are_dropped():
    words = [f"w{i}" for i in range(40)]
    evaluation = [Prompt("e", "t", (" ".join(words[5:30]),)), Prompt("s", "t", ("Short one ?",))]
    cases = {
        "overlap": " ".join(["x", *words[10:23], "y"]),
        "case": " ".join(["x", *words[10:23], "y"]).upper(),
        "just short of it": " ".join(["x", *words[10:22], "y"]),
        "short": "short  ONE ?",
        "free": "something else",
    }
    kept = without_overlap([Prompt(name, "t", (text,)) for name, text in cases.items()], evaluation)
    assert [prompt.id for prompt in kept] == ["just short of it", "free"]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": 1, "task": "t", "turns": []}', '{"id": 1, "task": "t", "turns": [3]}', '{"id": 1}']
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": 1, "task": "t", "turns": ["a"]}\n' + line + "\n")
    with pytest.raises(PromptError, match=r"p.jsonl:2: not a prompt"):
        read_prompts([file])
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts([tmp_path / "none"])


@pytest.fixture(scope="module")
def figures(pipeline):
    out = pipeline / "figures.json"
    modes = [
        "lookup@9",
        "dflash",
        "d2sd:free",
        "d2sd",
        "d2sd@1",
        "runner_up",
        "ddtree@6",
        "first_text@6",
        "pooled@6",
        "pooled@20",
    ]
    command = [str(pipeline / "pipeline.yaml"), "--prompts", str(pipeline / "prompts.jsonl"), "--tokens", "20"]
    command += ["--json", str(out), "--docs", str(pipeline / "docs"), "--build", str(pipeline / "build"), "--modes", *modes]
    assert evaluate.main(command) == 0
    return json.loads(out.read_text())


def test_the_figures_are_those_of_real_decoding(pipeline, figures):
    """Every mode on the real engines, target included: the same cycles as on the replayed target."""
    directory = BuildDirectory.open(pipeline / "build")
    target, first, second = directory.load()
    (path,) = (pipeline / "build" / "evaluation").glob("*-20.jsonl")
    answers = read_corpus(path)
    assert len(answers) == len(QUESTIONS) + 1  # one has two turns
    tasks = sorted({answer.task for answer in answers})
    for mode in figures["acceptance_length"]:
        name, redraft, size = evaluate.parse_mode(mode)
        options = {"rows": size} if MODES[name].sources else {"branches": size or 3}
        options = {"branches": 3} | options
        decoder = Decoder(target, first, second, mode=name, block_size=6, vocabulary=300, redraft=redraft, **options)
        scheduler = Scheduler(decoder, 8)
        sequences = [Sequence(answer.prompt_ids, len(answer.response_ids)) for answer in answers]
        for i in sorted(range(len(answers)), key=lambda i: len(answers[i])):  # what is learned depends on the order
            scheduler.add(sequences[i])
        while scheduler:
            scheduler.step()
        assert [s.answer for s in sequences] == [answer.response_ids for answer in answers]
        means = []
        for task in tasks:
            rows = [(s, a) for s, a in zip(sequences, answers, strict=True) if a.task == task]
            means.append(sum(len(a.response_ids) for _, a in rows) / sum(s.cycles for s, _ in rows))
        assert figures["acceptance_length"][mode]["mean"] == pytest.approx(np.mean(means))
        assert figures["acceptance_length"][mode]["by_task"] == pytest.approx(dict(zip(tasks, means, strict=True)))


def test_the_report_is_written(pipeline, figures):
    text = (pipeline / "docs" / "acceptance.md").read_text()
    assert report.table(figures) in text
    assert (pipeline / "docs" / "acceptance.png").stat().st_size > 5000
    assert (pipeline / "docs" / "first_draft.png").stat().st_size > 5000
    assert set(figures["gain_of_d2sd"]) == set(figures["acceptance_length"]) - {"d2sd"}
    nodes, fewer = figures["nodes"], figures["gain_at_no_more_nodes"]
    assert {"d2sd:free", "runner_up"} <= set(fewer)
    assert "dflash" not in fewer  # a first draft alone has fewer nodes than any of them
    assert all(nodes[gain["of"]] <= nodes[mode] and gain["low"] <= gain["mean"] <= gain["high"] for mode, gain in fewer.items())
    for length in figures["acceptance_length"].values():
        assert length["low"] <= length["mean"] <= length["high"]


def test_a_report_without_drafts_says_nothing_of_them(tmp_path, figures):
    report.write_docs({name: value for name, value in figures.items() if name != "first_draft"}, tmp_path)
    assert report.table(figures) in (text := (tmp_path / "acceptance.md").read_text())
    assert "first draft" not in text
    assert [file.name for file in tmp_path.glob("*.png")] == ["acceptance.png"]


NOBODY = dict.fromkeys(ORIGINS, 0)


def test_trees_are_compared_at_equal_rows(figures):
    pairs = [(gain["mode"], gain["over"]) for gain in figures["gain_at_equal_rows"]]
    assert pairs == [("ddtree@6", "dflash"), ("first_text@6", "ddtree@6"), ("pooled@6", "first_text@6")]
    lengths = figures["acceptance_length"]
    for gain in figures["gain_at_equal_rows"]:
        assert gain["low"] <= gain["mean"] <= gain["high"]
        difference = lengths[gain["mode"]]["mean"] - lengths[gain["over"]]["mean"]
        assert gain["mean"] == pytest.approx(difference, abs=0.1)
    trees = {"lookup@9", "ddtree@6", "first_text@6", "pooled@6", "pooled@20"}
    assert set(figures["expected_of_said"]) == set(figures["accepted_by_source"]) == trees
    for mode, shares in figures["accepted_by_source"].items():
        for share in shares.values():
            assert mode != "ddtree@6" or share in (NOBODY, NOBODY | {"first": 1})
            assert mode != "lookup@9" or share["first"] == share["second"] == 0
    assert all(figures["nodes"][mode] <= int(mode.partition("@")[2]) for mode in trees)


@pytest.mark.parametrize(
    "mode", ["warp", "autoregressive", "auto", "d2sd:fre", "d2sd@0", "d2sd@17", "d2sd@2:free", "pooled:free", "pooled@100", ""]
)
def test_an_unknown_mode_is_refused(pipeline, capsys, mode):
    assert evaluate.main([str(pipeline / "pipeline.yaml"), "--modes", mode]) == 1
    assert f"error: --modes: found {mode}, allowed: " in capsys.readouterr().err


def test_what_is_said_of_the_first_draft():
    confidences = np.array([[0.9, 0.5, 0.2], [0.9, 0.5, 0.2], [0.6, 0.9, 0.9], [0.9, 0.9, 0.9]])
    correct = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 1, 0]]).astype(bool)
    known = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]]).astype(bool)  # the last answer ends inside its block
    said = report.first_draft(confidences, correct, known)
    assert said["accuracy"] == pytest.approx([3 / 4, 2 / 3, 0.0])
    # Boundaries 1, 2, 0; r of the first two rows: 0.1, 0.45, 0.36, of the third: 0.4, 0.06, 0.054.
    assert said["boundary_in_top"] == pytest.approx([2 / 3, 1.0, 1.0])
    reached = {0.2: [0], 0.5: [0, 1], 0.6: [0], 0.9: [1, 1, 1, 1]}
    expected = sum(len(hits) * abs(c - np.mean(hits)) for c, hits in reached.items()) / 8
    assert said["calibration_error"] == pytest.approx(expected)


def test_acceptance_weighs_tasks_alike():
    answers = [Answer(str(i), "ab"[i > 2], [1], list(range(10)), 0.0) for i in range(4)]
    records = [Record(nodes=[1] * n) for n in (5, 5, 5, 2)]
    length = report.acceptance(answers, records)
    assert length["by_task"] == {"a": 2.0, "b": 5.0}
    assert length["mean"] == 3.5


def test_features_of_an_answer_match_what_the_target_engine_gives(pipeline):
    """The drafters must see in the evaluation what they see when serving: features of the same layers."""
    target, _, _ = BuildDirectory.open(pipeline / "build").load()
    answer = Answer("a", "t", [5, 6, 7, 8], [9, 10], 0.0)
    model = checkpoints.load_target(checkpoints.open_target(pipeline / "target"))
    expected = Features([answer], model, tiny.LAYER_IDS, None).batch([0])[0].float().numpy()
    number = target.open(answer.tokens, 8)
    target.forward([number], np.array([answer.tokens]), np.arange(6)[None], np.tri(6, dtype=bool)[None], [6], 1)
    target.keep([range(6)])
    found = target.features(number, 0, 6)
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.05)
