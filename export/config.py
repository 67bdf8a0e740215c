"""``pipeline.yaml``: the one configuration file, validated when it is read.

``python -m export.config`` prints its JSON schema, published as ``docs/pipeline.schema.json`` for editors.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from decoding.modes import ModeName, Redraft, Selection

CompiledBackend = Literal["tensorrt", "tensorrt_rtx"]
Backend = Literal["openvino", "onnxruntime", CompiledBackend]
Weights = Literal["auto", "f32", "int8", "int4"]
DrafterWeights = Literal["auto", "f32", "int8", "int4"]
ALONE: tuple[ModeName, ...] = ("auto", "free", "ngrams", "lookup", "autoregressive")  # what can be decoded without drafters
BLOCK_SIZE = 8  # γ of a drafter that training makes from nothing
Port = Annotated[int, Field(ge=0, le=65535)]


class UserError(ValueError):
    """What was asked for cannot be done; the message says why and what to do, and is all that a user needs to see."""


class ConfigError(UserError):
    """The configuration cannot be used; the message has a line for each reason."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TargetSection(Section):
    """The language model whose answers are served."""

    checkpoint: str = Field(
        min_length=1,
        description="a Hugging Face id, a directory, a .gguf file, or wheel:NAME==VERSION/PATH of a .gguf in a wheel",
    )
    revision: str | None = Field(None, description="commit or tag of a Hugging Face id")


class DraftersSection(Section):
    """Checkpoints in the public DFlash format: a directory or a Hugging Face id."""

    first: str = Field(min_length=1, description="DFlash, which drafts the block")
    second: str = Field(min_length=1, description="the VP-Drafter, which redrafts the branches")


class DecodingSection(Section):
    """How a cycle drafts and verifies (docs/method.md)."""

    mode: ModeName = "auto"
    ngrams: str | None = Field(
        None, min_length=1, description="table of what the target usually says next; made by training.ngrams"
    )
    block_size: int | None = Field(None, ge=2, le=64, description="γ; left out: what the first drafter was trained with")
    branches: int = Field(4, ge=1, le=16, description="K, redrafted branches a cycle")
    selection: Selection = Field(
        "confidence", description="how the K boundaries are chosen: the likeliest rejections, or any with equal chance"
    )
    redraft: Redraft = Field("exclusive", description="whether a branch may repeat the token whose rejection it is there for")


class EngineSection(Section):
    """What the graphs are compiled for."""

    backend: Backend = "openvino"
    weights: Weights = Field(
        "auto",
        description="of the target; auto: as they lie in a quantised GGUF file, else int8 if it keeps the answers; "
        "int8, int4: rounded to it by the build",
    )
    drafter_weights: DrafterWeights = Field(
        "auto", description="of both drafters; int8, int4: rounded to it by the build; auto: int4, f32 with TensorRT"
    )
    providers: list[Literal["cuda", "cpu"]] = Field(
        ["cuda", "cpu"], min_length=1, description="ONNX Runtime's providers; the first one present is used"
    )
    precision: Literal["auto", "f32", "bf16", "f16"] = Field(
        "auto",
        description="auto: bf16 where the runtime multiplies bf16 matrices in hardware, else f32; f16: TensorRT alone",
    )

    @model_validator(mode="after")
    def _compiled(self) -> "EngineSection":
        if self.backend == "onnxruntime" and self.precision not in ("auto", "f32"):
            raise ValueError("precision auto or f32 with backend onnxruntime")
        if self.backend == "openvino" and self.precision == "f16":
            raise ValueError("precision auto, f32 or bf16 with backend openvino")
        if self.backend == "tensorrt" and self.precision == "f32":  # the plugin's kernel has no f32 form
            raise ValueError("precision auto, bf16 or f16 with backend tensorrt")
        rounded = self.weights in ("int8", "int4") or self.drafter_weights in ("int8", "int4")
        if rounded and self.backend in get_args(CompiledBackend):  # its networks are typed: no blocks in them yet
            raise ValueError(f"weights and drafter_weights auto or f32 with backend {self.backend}")
        return self

    @property
    def graph_dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """What the graphs are exported in: OpenVINO lowers the precision itself, TensorRT computes in the graph's types."""
        if self.backend in ("openvino", "onnxruntime"):
            return "float32"
        return {"f32": "float32", "f16": "float16"}.get(self.precision, "bfloat16")  # type: ignore[return-value]


class LimitsSection(Section):
    sequences: int = Field(16, ge=1, le=256, description="decoded together, at most; memory may hold fewer")
    kv_memory: float | None = Field(
        None,
        gt=0,
        description="GiB for the K/V of all sequences, with openvino alone; left out: what they can need, up to half of "
        "what is free",
    )
    waiting: int = Field(64, ge=0, le=65536, description="requests that may wait for a place; the next is refused, UNAVAILABLE")
    deadline: float = Field(300.0, gt=0, description="seconds after its arrival when an answer ends with what it has")
    length: int = Field(2048, ge=16, le=1_048_576, description="tokens of a prompt and its answer")
    max_tokens: int = Field(256, ge=1, description="length of an answer whose request names none, as far as there is room")


class TritonSection(Section):
    host: str = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 8001
    metrics_port: Port = 8002

    @model_validator(mode="after")
    def _distinct(self) -> "TritonSection":
        ports = [p for p in (self.http_port, self.grpc_port, self.metrics_port) if p]
        if len(set(ports)) < len(ports):
            raise ValueError("http_port, grpc_port and metrics_port must differ")
        return self


class TrainingSection(Section):
    """How ``training/`` makes drafters for this target."""

    corpus: str = Field("build/corpus.jsonl", description="the target's answers, JSONL; written by training.corpus")
    prompts: list[str] = Field([], description="JSONL files of prompts; none: the target invents its own")
    evaluation_prompts: list[str] = Field([], description="JSONL files that no training prompt may overlap")
    layers: int = Field(4, ge=1, le=32, description="layers of a drafter")
    target_layer_ids: list[int] | None = Field(None, description="left out: spread over the target as DFlash does")
    block_size: int | None = Field(
        None, ge=2, le=64, description=f"γ; left out: what the drafter that training starts from has, else {BLOCK_SIZE}"
    )
    draft_vocabulary: int | None = Field(None, ge=2, description="most frequent tokens kept in the draft head")
    beta: float = Field(0.8, gt=0, le=1, description="β of the VP objective: Pr(l = j) ∝ β^j")
    tau: float = Field(4.0, gt=0, description="τ: place k weighs exp(-(k - l - 1)/τ)")
    rejections: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of VP blocks kept up to the first drafter's real rejection, its token banned",
    )
    foreseen: float = Field(
        1.0, ge=0, le=1, description="weight of places that a lookup in the text gets right anyway (of the others: 1)"
    )
    loss: Literal["tokens", "distribution", "mixed"] = Field(
        "tokens", description="what a drafter learns: the token said, the target's distribution there, or half of each"
    )
    shares: dict[str, Annotated[float, Field(ge=0, le=16)]] = Field(
        {}, description="how often an epoch shows an answer of a task, by the task's name; 1 if left out"
    )
    sampled: float = Field(1.0, ge=0, le=16, description="and how often one that was sampled, times its task's share")
    steps: int = Field(2000, ge=1)
    blocks: int = Field(512, ge=1, description="blocks a pass, on each device")
    anchors: int = Field(256, ge=1, description="blocks an answer, at most")
    accumulate: int = Field(1, ge=1, description="passes whose gradients are summed into a step")
    learning_rate: float = Field(2e-3, gt=0, description="of Muon, which trains the matrices")
    average: float = Field(0.99, ge=0, lt=1, description="decay of the weights' moving average, which is what is saved")
    seed: int = 0


class Pipeline(Section):
    """One deployment: a target, its drafters, and how they are compiled and served."""

    target: TargetSection
    drafters: DraftersSection | None = Field(None, description="left out: the target is served alone, and can be trained for")
    decoding: DecodingSection = DecodingSection()
    engine: EngineSection = EngineSection()
    limits: LimitsSection = LimitsSection()
    triton: TritonSection = TritonSection()
    training: TrainingSection = TrainingSection()

    @model_validator(mode="after")
    def _drafted(self) -> "Pipeline":
        if self.decoding.mode == "ngrams" and self.decoding.ngrams is None:
            raise ValueError(
                'decoding.mode: found "ngrams", allowed: any other without a table of them in decoding.ngrams '
                "(training.ngrams makes one)"
            )
        if self.drafters is None and self.decoding.mode not in ALONE:
            raise ValueError(f'decoding.mode: found "{self.decoding.mode}", allowed: {", ".join(ALONE)} without drafters')
        return self

    @model_validator(mode="after")
    def _budgeted(self) -> "Pipeline":
        budget, backend = self.limits.kv_memory, self.engine.backend
        if budget is not None and backend != "openvino":  # dense caches have no pool that could be so large
            raise ValueError(f"limits.kv_memory: found {budget}, allowed: left out with engine.backend {backend}")
        return self

    def without_drafters(self) -> "Pipeline":
        """The target alone: what answers prompts before there are drafters."""
        decoding = self.decoding.model_copy(update={"mode": "autoregressive"})
        return self.model_copy(update={"drafters": None, "decoding": decoding})


def load(path: Path, backend: Backend | None = None) -> Pipeline:
    """Read and validate a pipeline file.

    Args:
        backend: in place of the file's ``engine.backend``.

    Raises:
        ConfigError: naming each bad key by its path, with what was found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: found {raw!r}, allowed: a mapping with {', '.join(Pipeline.model_fields)}")
    if backend and isinstance(raw.setdefault("engine", {}), dict):
        raw["engine"]["backend"] = backend
    try:
        return Pipeline.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(issue) for issue in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def _explain(issue: Any) -> str:
    """One line: the key's path, what was found, what is allowed."""
    where = ".".join(str(part) for part in issue["loc"]) or "the file"
    kind, context, found = issue["type"], issue.get("ctx", {}), issue["input"]
    if not issue["loc"]:
        return str(context["error"])
    if kind == "extra_forbidden":
        section = _section(issue["loc"][:-1])
        return f"{where}: unknown key; allowed: {', '.join(section.model_fields)}"
    if kind == "missing":
        about = _section(issue["loc"][:-1]).model_fields[issue["loc"][-1]].description
        return f"{where}: missing, required" + (f" ({about})" if about else "")
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
    elif kind == "value_error":
        allowed = str(context["error"])
    else:
        allowed = issue["msg"].removeprefix("Input should be ")
    return f"{where}: found {json.dumps(found, default=repr)}, allowed: {allowed}"


def _section(location: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Pipeline
    for part in location:
        annotation: Any = model.model_fields[str(part)].annotation
        model = next(kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None))
    return model


def schema() -> str:
    """The JSON schema of ``pipeline.yaml``, as text."""
    return json.dumps(Pipeline.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
