"""OpenVINO GenAI on the same GGUF file: a request a line on standard input, its tokens and seconds on standard output."""

import json
import sys
import time

import openvino_genai

path, threads = sys.argv[1], int(sys.argv[2])
options = {"INFERENCE_NUM_THREADS": threads}
plain = openvino_genai.LLMPipeline(path, "CPU", **options)
print(json.dumps({"modes": ["plain"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    wanted = openvino_genai.GenerationConfig(max_new_tokens=request["tokens"], ignore_eos=True, apply_chat_template=False)
    began = time.perf_counter()
    results = [plain.generate([prompt], wanted) for prompt in request["prompts"]]
    seconds = time.perf_counter() - began
    tokens = request["tokens"] * len(results)
    if len(results) == 1:  # decoding alone
        tokens, seconds = request["tokens"] - 1, results[0].perf_metrics.get_tpot().mean / 1e3 * (request["tokens"] - 1)
    print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)
