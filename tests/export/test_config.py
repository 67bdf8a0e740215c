from pathlib import Path

import pytest

from export.config import ConfigError, load, schema

ROOT = Path(__file__).resolve().parents[2]
GOOD = "target: {checkpoint: a}\ndrafters: {first: b, second: c}\n"


@pytest.mark.parametrize("file", [ROOT / "pipeline.yaml", *sorted((ROOT / "configs").glob("*.yaml"))], ids=lambda p: p.name)
def test_shipped_pipelines_are_valid(file):
    load(file)


def test_the_published_schema_is_current():
    published = (ROOT / "docs" / "pipeline.schema.json").read_text(encoding="utf-8")
    assert published == schema(), "run: python -m export.config > docs/pipeline.schema.json"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            GOOD + "extra: 1",
            "extra: unknown key; allowed: target, drafters, decoding, engine, limits, triton, training",
        ),
        (
            GOOD + "decoding: {brnches: 1}",
            "decoding.brnches: unknown key; allowed: mode, ngrams, block_size, branches, selection, redraft",
        ),
        (GOOD + "decoding: {branches: 99}", "decoding.branches: found 99, allowed: less than or equal to 16"),
        (GOOD + "decoding: {branches: '4'}", 'decoding.branches: found "4", allowed: a valid integer'),
        (
            GOOD + "decoding: {mode: fast}",
            'decoding.mode: found "fast", allowed: auto, autoregressive, lookup, ngrams',
        ),
        (GOOD + "decoding: {mode: ngrams}", 'decoding.mode: found "ngrams", allowed: any other without a table'),
        (GOOD + "engine: {providers: [cpu, tpu]}", 'engine.providers.1: found "tpu", allowed: cuda, cpu'),
        (
            GOOD + "engine: {precision: f16}",
            'engine: found {"precision": "f16"}, allowed: precision auto, f32 or bf16 with backend openvino',
        ),
        (
            GOOD + "engine: {precision: bf16, backend: onnxruntime}",
            'engine: found {"precision": "bf16", "backend": "onnxruntime"}, '
            "allowed: precision auto or f32 with backend onnxruntime",
        ),
        (GOOD + "engine: {precision: f32, backend: tensorrt}", 'engine: found {"precision": "f32", "backend": "tensorrt"}'),
        (
            GOOD + "engine: {backend: trt}",
            'engine.backend: found "trt", allowed: openvino, onnxruntime, tensorrt, tensorrt_rtx',
        ),
        (GOOD + "engine: {weights: int2}", 'engine.weights: found "int2", allowed: auto, f32, int8, int4'),
        (GOOD + "engine: {drafter_weights: q4}", 'engine.drafter_weights: found "q4", allowed: auto, f32, int8, int4'),
        (
            GOOD + "engine: {weights: int8, backend: tensorrt}",
            'engine: found {"weights": "int8", "backend": "tensorrt"}, '
            "allowed: weights and drafter_weights auto or f32 with backend tensorrt",
        ),
        (GOOD + "engine: {providers: []}", "engine.providers: found [], allowed: "),
        (
            GOOD + "limits: {kv_memory: 2.0}\nengine: {backend: onnxruntime}",
            "limits.kv_memory: found 2.0, allowed: left out with engine.backend onnxruntime",
        ),
        (GOOD + "limits: 3", "limits: found 3, allowed: "),
        (GOOD + "triton: {http_port: 8001}", "triton: found"),
        (GOOD + "training: {learning_rate: .nan}", "training.learning_rate: found NaN, allowed: a finite number"),
        (
            "target: {checkpoint: a}\ndecoding: {mode: d2sd}",
            'decoding.mode: found "d2sd", allowed: auto, free, ngrams, lookup, autoregressive without drafters',
        ),
        ("target: {checkpoint: a}\ndrafters: {first: b}", "drafters.second: missing, required"),
        ("drafters: {first: b}\ntarget: {}", "target.checkpoint: missing, required (a Hugging Face id"),
        ("- 1", "found [1], allowed: a mapping"),
        ("", "found None, allowed: a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path, text, line):
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file)
    assert f"{file}: {line}" in str(error.value)


def test_another_backend_is_validated_with_the_rest(tmp_path):
    file = tmp_path / "pipeline.yaml"
    file.write_text(GOOD + "engine: {precision: f32}")
    assert load(file, "tensorrt_rtx").engine.backend == "tensorrt_rtx"
    with pytest.raises(ConfigError, match="allowed: precision auto, bf16 or f16 with backend tensorrt"):
        load(file, "tensorrt")
    file.write_text(GOOD + "limits: {kv_memory: 2.0}")
    assert load(file).limits.kv_memory == 2
    with pytest.raises(ConfigError, match=r"limits.kv_memory: found 2.0, allowed: left out with engine.backend tensorrt_rtx"):
        load(file, "tensorrt_rtx")


def test_every_fault_has_its_line(tmp_path):
    file = tmp_path / "pipeline.yaml"
    file.write_text(GOOD + "decoding: {branches: 0, block_size: 1}\nlimits: {sequences: 0}")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.yaml")
