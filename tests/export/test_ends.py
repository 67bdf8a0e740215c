import json

import pytest

from export.checkpoints import CheckpointError
from export.ends import end_ids
from tests import tiny

CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|over|>\n{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    return tiny.save_target(tmp_path)


def write(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def chat(folder, template, *special):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return [tokenizer.convert_tokens_to_ids(text) for text in special]


def test_the_configurations_ids(folder):
    write(folder, "generation_config.json", eos_token_id=[7, 9])
    assert end_ids(folder, 300) == [1, 7, 9]  # 1 ends a chat


def test_null_falls_back_to_what_else_says_it(folder):
    write(folder, "generation_config.json", eos_token_id=None)
    write(folder, "config.json", eos_token_id=5)
    assert end_ids(folder, 300) == [1, 5]
    (folder / "generation_config.json").unlink()
    write(folder, "config.json", eos_token_id=None)
    assert end_ids(folder, 300) == [1]


def test_a_chat_format_that_ends_with_another_token(folder):
    (over,) = chat(folder, CHATML, "<|over|>")
    assert end_ids(folder, 303) == [1, over]


def test_a_template_without_an_end_or_that_refuses(folder):
    for template in ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "{{ raise_exception('no') }}", "x"):
        chat(folder, template)
        assert end_ids(folder, 300) == [1]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["</s>", 9999, -1, True, [1, None], ["</s>"], 1.0])
def test_what_is_no_token_id_is_refused(folder, file, value):
    write(folder, file, eos_token_id=value)
    with pytest.raises(CheckpointError, match=rf"{file} eos_token_id: found .*, allowed: a token id from 0 to 299"):
        end_ids(folder, 300)
