"""Text or chat messages → the target's token ids."""

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from triton_repo import tensors
from triton_repo.prompt import Prompts

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
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # The repository may be reached through a link, the build lies beside the folder itself.
        build = Path(args["model_repository"]).resolve().parent.parent
        self.prompts = Prompts(build / "tokenizer")

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse([tensors.output("input_ids", self._tokenize(request), np.int32)])
        except ValueError as error:
            return pb_utils.InferenceResponse(error=tensors.invalid(error))
        except Exception as error:  # whatever it is, it is this request's alone
            pb_utils.Logger.log_error(f"preprocessing: a request could not be read: {error!r}")
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the request could not be read: {error!r}"))

    def _tokenize(self, request: Any) -> list[int]:
        for name, neutral in NEUTRAL.items():
            found = tensors.scalar(request, name, neutral)
            if found != neutral:
                raise ValueError(f"{name}: found {found}, allowed: {neutral}, since the answers are the target's own")
        if tensors.strings(request, "bad_words"):
            raise ValueError("bad_words: found some, allowed: none, since the answers are the target's own")
        text = tensors.scalar(request, "text_input", "")
        if ids := tensors.integers(request, "prompt_ids"):
            if text or tensors.scalar(request, "messages"):
                raise ValueError("prompt_ids: found beside text_input or messages, allowed: one of the three")
            return ids
        messages = tensors.scalar(request, "messages")
        arguments = tensors.scalar(request, "chat_template_kwargs")
        if messages and text:
            raise ValueError("text_input: found beside messages, allowed: one of the two")
        if arguments and not messages:
            raise ValueError("chat_template_kwargs: found without messages, allowed: beside them")
        if messages:
            opened = bool(tensors.scalar(request, "add_generation_prompt", True))
            continued = bool(tensors.scalar(request, "continue_final_message", False))
            return self.prompts.chat(messages, arguments, opened=opened, continued=continued)
        ids = self.prompts.text(text, bool(tensors.scalar(request, "parse_special", False)))
        if not ids:
            raise ValueError("text_input: found an empty prompt, allowed: text, or messages instead")
        return ids
