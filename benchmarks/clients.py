"""``python -m benchmarks.clients``: other people's tools against a running gateway, each in an environment of its own.

lm-eval asks for answers and for log-probabilities, aiperf and guidellm measure a load. Small and without any hub: tasks and
prompts are written here, and the tokenizer is the build's. It fails where a tool fails.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from export.build import ROOT

PACKAGES = {"lm-eval": "lm-eval[api]==0.4.13 transformers", "aiperf": "aiperf==0.13.0", "guidellm": "guidellm==0.8.1"}
CHOICE = """\
task: d2sd_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ANSWER = """\
task: d2sd_answer
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}} Answer with one word."
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 24, temperature: 0}}
metric_list: [{{metric: exact_match, ignore_case: true, ignore_punctuation: true}}]
"""
QUESTIONS = (
    ("The capital of France is", (" Paris", " Berlin", " Madrid")),
    ("Water freezes into", (" ice", " steam", " sand")),
    ("The opposite of hot is", (" cold", " warm", " red")),
    ("A week has seven", (" days", " months", " hours")),
    ("The sun rises in the", (" east", " west", " north")),
    ("Cats say", (" meow", " woof", " moo")),
)


def environment(folder: Path, tool: str) -> Path:
    """The tool's ``bin`` folder, made if it is not there."""
    place = folder / tool / "bin"
    stamp = folder / tool / ".installed"
    if not stamp.exists() or stamp.read_text() != PACKAGES[tool]:
        print(f"{tool}: installing", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / tool], check=True)
        subprocess.run([place / "python", "-m", "pip", "install", "--quiet", *PACKAGES[tool].split()], check=True)
        stamp.write_text(PACKAGES[tool])
    return place


def tasks(folder: Path) -> Path:
    """Two tasks for lm-eval."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "questions.jsonl"
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def commands(tool: str, folder: Path, url: str, model: str, tokenizer: Path) -> list[list[str]]:
    """What is run, the tool's own name first."""
    if tool == "lm-eval":
        shared = ["--include_path", str(tasks(folder / "tasks")), "--output_path", str(folder / "lm-eval-results")]
        known = f"model={model},num_concurrent=4,max_retries=1"
        ids = f"{known},base_url={url}/completions,tokenizer_backend=huggingface,tokenizer={tokenizer}"
        chat = f"{known},base_url={url}/chat/completions"
        return [
            ["lm_eval", "--model", "local-completions", "--model_args", ids, "--tasks", "d2sd_choice", *shared],
            [
                *("lm_eval", "--model", "local-chat-completions", "--model_args", chat, "--tasks", "d2sd_answer"),
                *("--apply_chat_template", *shared),
            ],
        ]
    if tool == "aiperf":
        return [
            [
                *("aiperf", "profile", "--model", model, "--url", url.removesuffix("/v1"), "--endpoint-type", "chat"),
                *("--streaming", "--tokenizer", str(tokenizer), "--concurrency", "4", "--request-count", "16"),
                *("--synthetic-input-tokens-mean", "60", "--output-tokens-mean", "32"),
                *("--extra-inputs", "ignore_eos:true", "--output-artifact-dir", str(folder / "aiperf-results")),
            ]
        ]
    data = "kind=synthetic_text,prompt_tokens=60,output_tokens=32"
    return [
        [
            *("guidellm", "run", "--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model={model}"),
            *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16", "--data", data),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}", "--disable-console-interactive"),
        ]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:9000/v1", help="of the gateway (default: %(default)s)")
    parser.add_argument("--model", default="d2sd", help="(default: %(default)s)")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "build" / "tokenizer", help="(default: the build's)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "clients", help="of environments and results")
    parser.add_argument("--only", choices=PACKAGES, help="one tool alone")
    args = parser.parse_args()
    folder = args.folder.resolve()
    failed = []
    for tool in [args.only] if args.only else PACKAGES:
        place = environment(folder, tool)
        for program, *options in commands(tool, folder, args.url, args.model, args.tokenizer.resolve()):
            print(f"$ {program} {' '.join(options)}", flush=True)
            own = {"PATH": f"{place}:/usr/bin:/bin", "HOME": str(folder)}
            # aiperf takes a folder for the name of a repository if it is told that there is no hub.
            own |= {} if tool == "aiperf" else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
            status = subprocess.run([place / program, *options], env=own, cwd=folder, check=False).returncode
            failed += [tool] if status else []
    print(f"failed: {', '.join(failed)}" if failed else "all ran")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
