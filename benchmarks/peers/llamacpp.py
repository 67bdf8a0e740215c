"""llama.cpp, by its wheel xllamacpp: a request a line on standard input, its tokens and seconds on standard output."""

import concurrent.futures
import json
import sys
import time

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, threads = sys.argv[1], int(sys.argv[2])
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
parameters.n_parallel, parameters.n_ctx = 8, 8 * 2048
server = xllamacpp.Server(parameters)
print(json.dumps({"modes": ["plain"]}), flush=True)


def answer(prompt: str, tokens: int) -> dict:
    wanted = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return server.handle_completions(wanted)["timings"]


for line in sys.stdin:
    request = json.loads(line)
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        timings = list(pool.map(answer, request["prompts"], [request["tokens"]] * len(request["prompts"])))
    seconds = time.perf_counter() - began
    tokens = sum(timing["predicted_n"] for timing in timings)
    if len(timings) == 1:  # decoding alone
        tokens, seconds = timings[0]["predicted_n"] - 1, timings[0]["predicted_ms"] / 1e3
    print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)
