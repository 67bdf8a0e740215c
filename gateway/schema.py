"""OpenAI's requests, as far as they are answered here; whatever else they may hold is refused by name.

Source: OpenAI's API reference (chat completions, completions), and what vLLM's server takes beyond it.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

TOP = 20  # likeliest tokens told at each place, at most
SEQUENCES = 128  # answers that a request may ask for


def only(*neutral: Any) -> Any:
    """A parameter that is not done here: what asks for nothing passes, null included."""
    return Field(default=None, json_schema_extra={"enum": [*neutral, None]})


Text = Annotated[str, Field(max_length=2**20)]
StopWord = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _neutral(cls, value: Any, info: ValidationInfo) -> Any:
        about = cls.model_fields[str(info.field_name)].json_schema_extra
        if isinstance(about, dict) and isinstance(allowed := about.get("enum"), list) and value not in allowed:
            raise PydanticCustomError("refused", "{allowed}", {"allowed": ", ".join(json.dumps(one) for one in allowed)})
        return value


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Request(Strict):
    """What both kinds of request may say."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[str, Field(max_length=256)] | Annotated[list[StopWord], Field(max_length=32)] | None = None
    n: Annotated[int, Field(ge=1, le=SEQUENCES)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Without effect on an answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    # What would change the answer and is not done here.
    presence_penalty: Any = only(0)
    frequency_penalty: Any = only(0)
    repetition_penalty: Any = only(1)
    length_penalty: Any = only(1)
    min_p: Any = only(0)
    logit_bias: Any = only({})
    bad_words: Any = only([])
    allowed_token_ids: Any = only()
    stop_token_ids: Any = only([])
    logits_processors: Any = only([])
    use_beam_search: Any = only(False)
    include_stop_str_in_output: Any = only(False)
    skip_special_tokens: Any = only(True)
    spaces_between_special_tokens: Any = only(True)
    truncate_prompt_tokens: Any = only()
    prompt_logprobs: Any = only()
    return_tokens_as_token_ids: Any = only(False)
    return_token_ids: Any = only(False)
    priority: Any = only(0)
    guided_json: Any = only()
    guided_regex: Any = only()
    guided_choice: Any = only()
    guided_grammar: Any = only()
    structured_outputs: Any = only()
    response_format: Any = only({"type": "text"})

    @model_validator(mode="after")
    def _streams(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed: beside stream: true only")
        if self.min_tokens and not self.ignore_eos:
            raise ValueError(
                f"min_tokens: found {self.min_tokens}, allowed: 0, or any beside ignore_eos, which no end is before"
            )
        return self


class Part(Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    # For the target's chat template.
    name: str | None = None
    tool_calls: list[dict[str, JsonValue]] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    # What an answer of OpenAI's holds too, and comes back with a conversation.
    refusal: Any = only()
    annotations: Any = only([])
    audio: Any = only()
    function_call: Any = only()
    reasoning: Any = only()

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("content: missing")
        return self


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    parallel_tool_calls: bool | None = None  # of no tools
    tools: Any = only([])
    tool_choice: Any = only("none", "auto")
    functions: Any = only([])
    modalities: Any = only(["text"])
    audio: Any = only()
    prediction: Any = only()
    reasoning_effort: Any = only()
    verbosity: Any = only()
    web_search_options: Any = only()
    chat_template: Any = only()
    documents: Any = only()
    chat_template_kwargs: dict[str, JsonValue] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: Any = only(False)
    echo: Any = only(False)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        old, new = self.max_tokens, self.max_completion_tokens
        if None not in (old, new) and old != new:
            raise ValueError(f"max_tokens: found {old} beside max_completion_tokens {new}, allowed: one of the two")
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs: found {self.top_logprobs}, allowed: beside logprobs: true only")
        return self


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=SEQUENCES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=SEQUENCES)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    suffix: Any = only("")
    best_of: Any = only(1)
    add_special_tokens: Any = only(True)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @model_validator(mode="after")
    def _bounded(self) -> "CompletionRequest":
        prompts, each = len(self.prompts), self.n or 1
        if prompts * each > SEQUENCES:
            raise ValueError(f"n: found {each} answers to each of {prompts} prompts, allowed: {SEQUENCES} together")
        return self
