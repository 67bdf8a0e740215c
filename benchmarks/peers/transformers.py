"""Transformers, plain and with its prompt lookup: a request a line on standard input, tokens and seconds on standard output."""

import json
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this file is not the package of its name

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(**where)
print(json.dumps({"modes": ["plain", "prompt lookup"]}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    more = {"prompt_lookup_num_tokens": 10} if request["mode"] == "prompt lookup" else {}
    count, seconds = 0, 0.0
    for prompt in request["prompts"]:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        times = []
        for tokens in (1, request["tokens"]):
            began = time.perf_counter()
            length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            model.generate(ids, attention_mask=torch.ones_like(ids), **length, **more)
            times.append(time.perf_counter() - began)
        alone = len(request["prompts"]) == 1  # decoding alone: without the prompt and its first token
        count += request["tokens"] - alone
        seconds += times[1] - (times[0] if alone else 0.0)
    print(json.dumps({"tokens": count, "seconds": seconds}), flush=True)
