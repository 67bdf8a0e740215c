"""The target's token ids → the piece of text that is new."""

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from triton_repo import tensors, text


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        build = Path(args["model_repository"]).parent.parent
        self.tokenizer = Tokenizer.from_file(str(build / "tokenizer" / "tokenizer.json"))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        """Show what the answer has beyond the tokens that an earlier response showed."""
        ids = tensors.integers(request, "output_ids")
        before = tensors.scalar(request, "shown_ids")
        final = tensors.scalar(request, "final")
        stop_words = tensors.strings(request, "stop_words")
        now, _ = text.shown(self.tokenizer, ids, stop_words, final)
        then, _ = text.shown(self.tokenizer, ids[:before], stop_words, final=False)
        # The rest goes through as it came: Triton wants all that follows a decoupled model to come through it.
        passed = [pb_utils.get_input_tensor_by_name(request, name) for name in ("output_tokens", "cycles", "finish_reason")]
        return pb_utils.InferenceResponse([tensors.texts("text_output", [now[len(then) :]]), *passed])
