"""From a target alone to its drafters in service, by the commands that a user types, on a tiny Qwen3."""

import json
import random
import re

import pytest
import yaml

from decoding.ngrams import load as load_ngrams
from engines.build_directory import BuildDirectory
from export import checkpoints
from export.build import build
from export.config import load
from export.prompts import read_prompts
from tests import tiny
from training import calibrate, compose, corpus, german, ngrams, train
from training.corpus import read_corpus

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog")


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A pipeline of a tiny Qwen3 with random drafters, prompts to train on and to evaluate on.

    Its weights are so small that a token follows from the one before it: there is something to learn in a few seconds.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "VALIDATE_EVERY", 10)
    monkeypatch.setattr(calibrate, "ENOUGH", 5)
    file = tiny.save_pipeline(tmp_path, "qwen3", initializer_range=0.02)
    for name, numbers in (("train", range(140)), ("eval", range(200, 206))):
        with open(f"{name}.jsonl", "w") as lines:
            for i in numbers:
                text = " ".join(WORDS[(i * 7 + k * k) % 9] for k in range(3 + i % 4)) + f" {i}"
                lines.write(json.dumps({"id": f"{name}/{i}", "task": "ab"[i % 2], "turns": [text]}) + "\n")
    options = yaml.safe_load(file.read_text())
    options["training"] = {
        "corpus": "corpus.jsonl",
        "prompts": ["train.jsonl"],
        "evaluation_prompts": ["eval.jsonl"],
        "target_layer_ids": tiny.LAYER_IDS,
        "layers": 2,
        "block_size": 4,
        "draft_vocabulary": 250,
        "blocks": 64,
        "learning_rate": 0.02,
        "average": 0.9,
        "steps": 60,
        "loss": "mixed",
    }
    file.write_text(yaml.safe_dump(options))
    return file


def test_a_target_gets_its_drafters(pipeline, capsys):
    """Corpus, DFlash, VP, calibration, n-grams, build."""
    assert corpus.main([str(pipeline), "--tokens", "20", "--slots", "16"]) == 0
    assert len(read_corpus(pipeline.parent / "corpus.jsonl")) > 130
    made, length = pipeline.parent / "build" / "training", 0.0
    for drafter in ("dflash", "vp"):
        assert train.main([str(pipeline), "--drafter", drafter]) == 0
        log = [json.loads(line) for line in (made / drafter / "log.jsonl").read_text().splitlines()]
        lengths = [record["acceptance_length"] for record in log if "acceptance_length" in record]
        assert log[-1]["step"] == 60
        assert lengths[-1] > (lengths[0] + 0.3 if drafter == "dflash" else length)
        length = lengths[-1]
        assert calibrate.main([str(pipeline), "--drafter", drafter]) == 0
        assert len(checkpoints.read_drafter(made / drafter).config.dflash_config[checkpoints.TEMPERATURES]) == 3
    assert "ECE after" in capsys.readouterr().out
    options = yaml.safe_load(pipeline.read_text())
    options["drafters"] = {"first": "build/training/dflash", "second": "build/training/vp"}
    options["decoding"] = {"ngrams": "build/training/ngrams.npz"}
    pipeline.write_text(yaml.safe_dump(options))
    assert ngrams.main([str(pipeline)]) == 0
    assert "of tokens are the likeliest option" in capsys.readouterr().out
    build(load(pipeline), made)
    directory = BuildDirectory.open(made)
    assert set(directory.manifest["graphs"]) == {"target", "first", "second"}
    assert load_ngrams(directory.ngrams).order == ngrams.ORDER


def test_prompts_are_composed_of_what_is_at_hand(pipeline, capsys):
    text = "Some say that Alice Brown was here. " + " ".join(f"Then number {i} came by and met Carol." for i in range(12))
    other = "It is known that Berlin is old. " + " ".join(f"In year {i} it grew, says David, by a half." for i in range(12))
    more = "We were told of Robin Hood. " + " ".join(f"He took {i} coins, and Marian gave them away." for i in range(12))
    with open("train.jsonl", "a") as lines:
        for i, passage in enumerate((text, other, more)):
            lines.write(json.dumps({"id": f"p/{i}", "task": "t", "turns": [passage]}) + "\n")
    command = [str(pipeline), "--output", "composed.jsonl", "--summarization", "6", "--rag", "8", "--translation", "30"]
    command += ["--qa", "5", "--chat", "9"]
    assert compose.main(command) == 0
    prompts = read_prompts([pipeline.parent / "composed.jsonl"])
    by_task = {task: [p for p in prompts if p.task == task] for task in compose.KINDS}
    assert [len(by_task[task]) for task in compose.KINDS] == [6, 8, 30, 5, 9]
    assert len({p.turns for p in prompts}) == len({p.id for p in prompts}) == len(prompts)
    assert all(any(start in p.turns[0] for start in ("Some say", "It is known", "We were told")) for p in by_task["rag"])
    assert all(len(p.turns) == 2 for p in by_task["chat"])
    assert any(name in p.turns[0] for p in by_task["qa"] for name in ("Alice Brown", "Carol", "Berlin", "David", "Robin Hood"))
    written = (pipeline.parent / "composed.jsonl").read_bytes()
    pipeline.write_text(pipeline.read_text().replace("- train.jsonl", "- train.jsonl\n  - composed.jsonl"))
    assert compose.main(command) == 0
    assert (pipeline.parent / "composed.jsonl").read_bytes() == written
    assert compose.main([*command, "--summarization", "1000"]) == 1
    assert "--summarization: found 1000, allowed: up to" in capsys.readouterr().err


def test_german_sentences_are_tokenised_as_translation_corpora_are():
    made = [german.sentence(random.Random(i)) for i in range(300)]
    assert len(set(made)) > 290
    assert all(re.fullmatch(r"[A-ZÄÖÜ]\S*( \S+)+ \.", text) for text in made)
    assert not any(re.search(r"\S,|,\S|\{|\}", text) for text in made)
    assert german.sentence(random.Random(7)) == made[7]


def test_composed_prompts_do_not_overlap_the_evaluation(pipeline):
    """A passage that is evaluated on is not asked about."""
    secret = "Nobody knows where Waldo went. " + " ".join(f"They searched house {i} and found but dust." for i in range(12))
    free = ["We were told of Robin Hood. " + " ".join(f"He took {i + j} coins, and left." for i in range(14)) for j in range(3)]
    with open("train.jsonl", "a") as lines:
        for i, passage in enumerate((secret, *free)):
            lines.write(json.dumps({"id": f"p/{i}", "task": "t", "turns": [passage]}) + "\n")
    with open("eval.jsonl", "a") as lines:
        lines.write(json.dumps({"id": "e", "task": "t", "turns": ["Summarize: " + secret]}) + "\n")
    counts = ["--summarization", "8", "--rag", "4", "--translation", "1", "--qa", "1", "--chat", "1"]
    assert compose.main([str(pipeline), "--output", "composed.jsonl", *counts]) == 0
    prompts = read_prompts([pipeline.parent / "composed.jsonl"])
    assert not any("Waldo went" in p.turns[0] for p in prompts if p.task in ("summarization", "rag"))
    assert sum(p.task == "summarization" for p in prompts) == 8
