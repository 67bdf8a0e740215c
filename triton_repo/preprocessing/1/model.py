"""Text or chat messages → the target's token ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer

from triton_repo import tensors

ROLES = ("system", "user", "assistant")
# Inputs of NVIDIA's ensemble that this one has no use for: accepted as long as they ask for nothing (and pad_id, which
# nothing is padded with here).
NEUTRAL: dict[str, Any] = {
    "beam_width": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "return_log_probs": False,
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        build = Path(args["model_repository"]).parent.parent
        self.tokenizer = AutoTokenizer.from_pretrained(build / "tokenizer", local_files_only=True)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            ids = self._tokenize(request)
        except ValueError as error:
            return pb_utils.InferenceResponse(error=tensors.invalid(error))
        return pb_utils.InferenceResponse([tensors.output("input_ids", ids, np.int32)])

    def _tokenize(self, request: Any) -> list[int]:
        for name, neutral in NEUTRAL.items():
            found = tensors.scalar(request, name, neutral)
            if found != neutral:
                raise ValueError(f"{name}: found {found}, allowed: {neutral}, since the answers are the target's own")
        if tensors.strings(request, "bad_words"):
            raise ValueError("bad_words: found some, allowed: none, since the answers are the target's own")
        text = tensors.scalar(request, "text_input", "")
        messages = tensors.scalar(request, "messages")
        if messages:
            if text:
                raise ValueError("text_input: found beside messages, allowed: one of the two")
            text = self._template(messages)
        ids = self.tokenizer(text, add_special_tokens=not messages)["input_ids"]
        if not ids:
            raise ValueError("text_input: found an empty prompt, allowed: text, or messages instead")
        return ids

    def _template(self, raw: str) -> str:
        """Put JSON chat messages through the target's chat template, with the opening of its answer."""
        if self.tokenizer.chat_template is None:
            raise ValueError("messages: the target has no chat template; use text_input")
        try:
            messages = json.loads(raw)
        except ValueError as error:
            raise ValueError(f"messages: not JSON ({error})") from None
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages: allowed: a JSON list of at least one object with role and content")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise ValueError(f"messages[{number}]: allowed: an object with role and content, and nothing else")
            if message["role"] not in ROLES:
                raise ValueError(f"messages[{number}].role: found {message['role']!r}, allowed: {', '.join(ROLES)}")
            if not isinstance(message["content"], str):
                raise ValueError(f"messages[{number}].content: found {type(message['content']).__name__}, allowed: text")
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template refuses by raising whatever it likes
            raise ValueError(f"messages: the target's chat template refuses them ({error})") from None
