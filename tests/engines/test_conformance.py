"""One suite for every runtime that is present: decoding over compiled graphs gives transformers' own greedy answers."""

from functools import cache

import numpy as np
import pytest
import torch

from decoding.cycle import Decoder
from decoding.modes import MODES
from decoding.sampling import Sampling
from decoding.scheduler import ALONE, Scheduler
from decoding.sequence import Sequence
from engines import openvino
from tests import shared, tiny
from tests.decoding import toys
from tests.engines.conftest import RUNTIMES


def scheduler(engines, mode, slots=3):
    about = {"block_size": 6, "branches": 3, "vocabulary": 300, "costs": toys.ToyCosts(), "ngrams": toys.ngrams(300, 1)}
    return Scheduler(Decoder(*engines, mode=mode, **about), slots)


def generate(model, prompt, count):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


PROMPTS = [np.random.default_rng(n).integers(0, 300, n).tolist() for n in (1, 2, 30, ALONE, ALONE + 1, 255, 300)]


@cache
def expected(model):
    """What transformers says to them, once for all modes and runtimes."""
    return [generate(model, prompt, 24) for prompt in PROMPTS]


# ``all`` and ``free`` have every source; trees of fewer are tried on toys (``tests/decoding``).
FEWER = ("ngrams", "first_text", "first_second", "pooled")
TRIED = [mode for mode in MODES if mode not in FEWER]
DRAWN = ("auto", "autoregressive", "all", "d2sd")  # how a draw goes does not depend on who drafted


@pytest.mark.parametrize("mode", TRIED)
def test_greedy_answers_are_transformers(served, mode):
    """Prompts on both sides of every border: a piece of a prompt, the smallest cache, and its growth in mid-answer."""
    model, engines = served
    running = scheduler(engines, mode)
    sequences = [Sequence(prompt, 24) for prompt in PROMPTS]
    for sequence in sequences:
        running.add(sequence)
    while running:
        running.step()
    assert [s.answer for s in sequences] == expected(model)


def test_a_seed_gives_one_answer_whoever_drafts_and_whatever_the_batch(served):
    _, engines = served
    answers = set()
    for mode in DRAWN:
        for slots in (1, 3):
            running = scheduler(engines, mode, slots)
            sequences = [Sequence(PROMPTS[2], 10, Sampling(0.8, 50, 0.95, seed)) for seed in range(3)]
            for sequence in sequences:
                running.add(sequence)
            while running:
                running.step()
            answers.add(tuple(tuple(s.answer) for s in sequences))
    assert len(answers) == 1


def test_a_sequence_beyond_a_forms_blocks_is_decoded_as_well(tmp_path_factory, monkeypatch):
    """OpenVINO's form for any number of rows takes over where the buffers of the others end, in mid-answer."""
    monkeypatch.setattr(openvino, "BLOCKS", 1)
    running = scheduler(RUNTIMES["openvino"](shared.pipeline(tmp_path_factory)), "ddtree")
    sequence = Sequence(PROMPTS[2], 40)  # its second block begins soon, which four rows have buffers for and one has not
    running.add(sequence)
    while running:
        running.step()
    assert sequence.answer == generate(tiny.target(), PROMPTS[2], 40)


def test_engines_start_afresh_after_a_reset(served):
    model, engines = served
    running = scheduler(engines, "d2sd")
    running.add(Sequence(PROMPTS[5], 20))
    running.step()
    running.reset()
    again = Sequence(PROMPTS[1], 8)
    running.add(again)
    while running:
        running.step()
    assert again.answer == generate(model, PROMPTS[1], 8)


LOOKS = ("numpy", "tolist", "item", "cpu", "nonzero", "__array__", "__bool__", "__int__", "__index__", "__float__")


@pytest.mark.parametrize("mode", TRIED)
def test_a_cycle_waits_for_its_runtime_once(served, monkeypatch, mode):
    """The host looks at no tensor of a device but through ``read``, and that is called once a cycle, for what was accepted."""
    _, engines = served
    running = scheduler(engines, mode)
    for sampling in (Sampling(), Sampling(0.8, 50, 0.95, 1), Sampling(0.8)):
        running.add(Sequence(PROMPTS[2], 24, sampling))
    for _ in range(2):  # prompts are taken in, shapes bound
        running.step()
    usual = {name: getattr(torch.Tensor, name) for name in LOOKS}
    shapes, read = [], engines[0].read

    def counted(array):
        shapes.append(tuple(array.shape))
        with monkeypatch.context() as allowed:
            for name, way in usual.items():
                allowed.setattr(torch.Tensor, name, way)
            return read(array)

    monkeypatch.setattr(engines[0], "read", counted)
    for name in LOOKS:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"a tensor was asked for its {name}"))
    for _ in range(3):
        running.step()
    looks = 0 if running.decoder.host else 3
    assert [shape[0] for shape in shapes] == [3] * looks, "one look a cycle, at something of each of the three sequences"
    running.reset()
