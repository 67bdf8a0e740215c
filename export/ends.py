"""Which tokens end an answer of a target."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from export.checkpoints import read_json
from export.config_fields import token_ids

REPLY = "d2sd-reply"  # what an assistant says in a chat that shows how its template ends it


def end_ids(folder: Path, vocabulary: int) -> list[int]:
    """Those that its configuration names, and those that its chat format ends a reply with: often another one.

    Raises:
        CheckpointError: a configuration names something else than token ids.
    """
    name = f"target {folder}"
    ids: list[int] = []
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        raw = read_json(path, name) if path.exists() else {}
        found = token_ids(raw.get("eos_token_id"), vocabulary, f"{name}: {file} eos_token_id")
        ids = ids or found
    return sorted({*ids, *_chat_ends(folder)})


def _chat_ends(folder: Path) -> set[int]:
    """The tokenizer's end token, and the special token that stands behind a reply in the chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    backend = tokenizer.backend_tokenizer
    special = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    ends = {special[tokenizer.eos_token]} if tokenizer.eos_token in special else set()
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
        try:
            behind = str(tokenizer.apply_chat_template(chat, tokenize=False)).rpartition(REPLY)[2].lstrip()
        except Exception:  # a template may demand more of a chat than this
            behind = ""
        if first := max((text for text in special if behind.startswith(text)), key=len, default=None):
            ends.add(special[first])
    return ends
