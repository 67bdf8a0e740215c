"""The cascade-attention kernel on a GPU: checked against the f32 reference, timed beside other ways, a cycle's cost predicted.

Without a GPU only the checks run, on smaller shapes, in Triton's interpreter: with TRITON_INTERPRET=1 set. A build given with
--build answers the evaluation's prompts as well, on whatever runtime it has here: the same answers in both modes, and how fast.
Every step is kept; what was cut off goes on where it was when the command is given again.
"""

import argparse
import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engines.build_directory import BuildDirectory, BuildDirectoryError
from engines.cache_write import write_rows
from plugins.cascade_attention import kernel, reference

GAMMA, K = 16, 4
TOLERANCE = 5e-3  # relative, in the norm, of bf16 results against f32


@dataclass(frozen=True)
class Heads:
    """The attention of a model. ``window`` and ``sinks``: of every second layer of GPT-OSS."""

    name: str
    query: int
    kv: int
    size: int
    window: int | None = None
    sinks: bool = False


MODELS = (
    Heads("Qwen3-8B", 32, 8, 128),
    Heads("GPT-OSS-20B", 64, 8, 64, window=128, sinks=True),
    Heads("SmolLM2-135M", 9, 3, 64),
)


Case = tuple[Heads, int, int, int]  # prefix, batch, nodes


def tree_mask(nodes: int, generator: torch.Generator) -> Tensor:
    """Ancestors and self in a random tree of ``nodes`` nodes: ``[N, N]`` bool."""
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = int(torch.randint(max(0, node - GAMMA), node, (1,), generator=generator))
        mask[node] |= mask[parent]
    return mask


def inputs(heads: Heads, batch: int, nodes: int, prefix: int, device: str) -> list[Any]:
    """Random arguments of the operator in bf16, its cache a quarter larger than the prefix."""
    g, there = (torch.Generator(kind).manual_seed(prefix + nodes) for kind in ("cpu", device))
    capacity = prefix + prefix // 4

    def draw(count: int, rows: int) -> Tensor:
        return torch.randn(batch, count, rows, heads.size, generator=there, device=device, dtype=torch.bfloat16)

    lengths = torch.full((batch,), prefix)
    lengths[1:] -= torch.randint(0, prefix // 2, (batch - 1,), generator=g)
    mask = torch.stack([tree_mask(nodes, g) for _ in range(batch)])
    tensors = [draw(heads.query, nodes), *(draw(heads.kv, rows) for rows in (nodes, nodes, capacity, capacity))]
    return [*tensors, lengths.to(device), mask.to(device), heads.size**-0.5]


def in_f32(arguments: list[Any]) -> list[Any]:
    """The arguments, bf16 tensors in f32."""
    return [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def exactly(arguments: list[Any], **options: Any) -> Tensor:
    """The f32 reference, a sequence at a time: its scores of a whole batch would fill a GPU."""
    *tensors, scale = in_f32(arguments)
    each = []
    for b in range(len(tensors[0])):
        own: list[Any] = [*(x[b : b + 1] for x in tensors), scale]
        each.append(reference.cascade_attention(*own, **options))
    return torch.cat(each)


def check(heads: Heads, prefix: int, batch: int, nodes: int, device: str) -> dict[str, Any]:
    """The relative error of the kernel, whether a repeated call gives the same bits, and the cache write."""
    arguments = inputs(heads, batch, nodes, prefix, device)
    sinks = torch.linspace(-1, 1, heads.query, device=device) if heads.sinks else None
    options: dict[str, Any] = {"window": heads.window, "sinks": sinks}
    exact = exactly(arguments, **options)
    found, again = (kernel.cascade_attention(*arguments, **options) for _ in range(2))
    new, cache, lengths = arguments[1], arguments[3], arguments[5]
    rows = torch.stack([torch.randperm(nodes)[: min(nodes, GAMMA)] for _ in range(batch)]).to(device)
    counts = torch.randint(0, rows.shape[1] + 1, (batch,)).to(device)
    expected = cache.clone()
    for b, (start, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        expected[b, :, start : start + count] = new[b, :, rows[b, :count]]
    write_rows(new[None], rows, counts, lengths, cache[None])
    return {
        "error": float((found.float() - exact).norm() / exact.norm()),
        "repeatable": torch.equal(found, again),
        "cache_write": torch.equal(cache, expected),
    }


def passes(row: dict[str, Any]) -> bool:
    return row["error"] < TOLERANCE and row["repeatable"] and row["cache_write"]


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, the L2 cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=50, rep=200, return_mode="median"))


def masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, lengths: Tensor, mask: Tensor, scale: float
) -> Any:
    """PyTorch's attention over the prefix and the new keys in one piece, the mask spelt out; the joining is not counted."""
    prefix = int(lengths.max())
    keys, values = (torch.cat([past[:, :, :prefix], new], 2) for past, new in ((past_k, k), (past_v, v)))
    seen = torch.arange(prefix, device=q.device) < lengths[:, None]
    whole = torch.cat([seen[:, None].expand(-1, q.shape[2], -1), mask], 2)[:, None]
    return lambda: scaled_dot_product_attention(q, keys, values, whole, scale=scale, enable_gqa=True)


def flex(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, lengths: Tensor, mask: Tensor, scale: float) -> Any:
    """FlexAttention over the same, compiled, the tree in its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    prefix = int(lengths.max())
    keys, values = (torch.cat([past[:, :, :prefix], new], 2) for past, new in ((past_k, k), (past_v, v)))

    def visible(b: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        node = (column - prefix).clamp(min=0)
        return torch.where(column < prefix, column < lengths[b], mask[b, row, node])

    torch._dynamo.reset()  # or it gives up compiling after some shapes
    blocks = create_block_mask(visible, q.shape[0], None, q.shape[2], keys.shape[2], device=str(q.device))
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(q, keys, values, block_mask=blocks, scale=scale, enable_gqa=True)


def whole_branches(heads: Heads, batch: int, prefix: int, device: str) -> list[Tensor]:
    """Random arguments of ``branches`` in bf16, keys and values of the branches spelt out for every query head."""
    shared, own = (batch, heads.kv, prefix), (batch * (K + 1), heads.query, GAMMA)
    shapes = ((batch, heads.query, (K + 1) * GAMMA), shared, shared, own, own)
    return [torch.randn(*shape, heads.size, device=device, dtype=torch.bfloat16) for shape in shapes]


def branches(q: Tensor, keys: Tensor, values: Tensor, new_k: Tensor, new_v: Tensor) -> Any:
    """The paper's way: K+1 whole branches, one call against the prefix, one causal call a branch, merged by log-sum-exp."""
    aten = torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    packed = q.reshape(*keys.shape[:2], -1, q.shape[-1])  # the heads of a group read the prefix once
    split = q.unflatten(2, (K + 1, GAMMA)).transpose(1, 2).flatten(0, 1)

    def call() -> Tensor:
        shared, shared_lse = flash(packed, keys, values)[:2]
        own, own_lse = flash(split, new_k, new_v, 0.0, True)[:2]
        own = own.unflatten(0, (len(q), K + 1)).transpose(1, 2).reshape(q.shape)
        own_lse = own_lse.unflatten(0, (len(q), K + 1)).transpose(1, 2).reshape(q.shape[:3])
        weight = torch.sigmoid(own_lse - shared_lse.reshape(q.shape[:3]))[..., None]
        return torch.lerp(shared.reshape(q.shape).float(), own.float(), weight).to(q.dtype)

    return call


def time(heads: Heads, prefix: int, batch: int, nodes: int, device: str) -> dict[str, Any]:
    """Milliseconds of the kernel and of the other ways, and the share of the copy bandwidth that reading the prefix reaches."""
    plain = Heads(heads.name, heads.query, heads.kv, heads.size)  # what the other ways can do too
    size = 2 * batch * heads.kv * prefix * heads.size * 2  # bytes of K and V
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = milliseconds(partial(target.copy_, source))  # reads and writes them: twice the traffic
    del source, target
    arguments = inputs(plain, batch, nodes, prefix, device)
    arguments[5].fill_(prefix)
    ways: dict[str, Callable[[], Callable[[], Any]]] = {
        "kernel": lambda: partial(kernel.cascade_attention, *arguments),
        "sdpa": lambda: masked_sdpa(*arguments),
        "flex": lambda: flex(*arguments),
        "branches": lambda: branches(*whole_branches(plain, batch, prefix, device)),
    }
    row: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            row[name] = milliseconds(way())
        except Exception as error:  # what a way of PyTorch's refuses is no reason not to time the others
            if name == "kernel":
                raise
            row[name] = None
            print(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    row["copy_bandwidth_share"] = copy / 2 / row["kernel"]
    return row


def cycle(device: str, prefix: int) -> dict[str, float]:
    """T_draft, T_redraft and T_verify of Qwen3-8B-shaped models with random weights, in plain steps; CUDA graphs."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from export.drafter import DFlash, Drafter
    from export.target import Target

    shape: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    config = Qwen3Config(vocab_size=151936, num_hidden_layers=36, max_position_embeddings=40960, **shape)
    small = Qwen3Config(vocab_size=151936, num_hidden_layers=5, max_position_embeddings=40960, **shape)
    small.block_size, small.dflash_config = GAMMA, {"target_layer_ids": [1, 9, 17, 25, 33]}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = Qwen3ForCausalLM(config)
        target = Target(model, [1, 9, 17, 25, 33]).eval()
        embedding, head = (layer.weight.detach() for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
        drafter = Drafter(DFlash(small), embedding, head).eval()
    torch.set_default_dtype(torch.float32)
    g = torch.Generator().manual_seed(0)

    def captured(module: torch.nn.Module, layers: int, *given: Tensor) -> float:
        past = [
            tuple(torch.randn(1, 8, prefix + 256, 128, device=device, dtype=torch.bfloat16) for _ in "kv")
            for _ in range(layers)
        ]
        lengths = torch.tensor([prefix], device=device)
        with torch.no_grad():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                module(*given, lengths, past)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                module(*given, lengths, past)
        return milliseconds(graph.replay)

    def verify(n: int) -> float:
        tokens = torch.randint(0, 151936, (1, n), device=device)
        positions = torch.arange(prefix, prefix + n, device=device)[None]
        return captured(target, 36, tokens, positions, tree_mask(n, g)[None].to(device))

    def draft(blocks: int) -> float:
        n = blocks * GAMMA
        features = torch.randn(1, GAMMA // 2, 5 * 4096, device=device)
        ids = torch.randint(0, 151936, (1, n), device=device)
        positions = torch.arange(prefix, prefix + GAMMA, device=device).repeat(blocks)[None]
        own = torch.block_diag(*[torch.ones(GAMMA, GAMMA)] * blocks).bool().to(device)
        seen = torch.cat([torch.ones(n, GAMMA // 2, dtype=torch.bool, device=device), own], 1)[None]
        return captured(drafter, 5, features, ids, positions, seen)

    step = verify(1)
    times = {"T_draft": draft(1), "T_redraft": draft(K), "T_verify": verify(80)}
    total = sum(times.values()) / step
    # The paper's mean acceptance length on Qwen3-8B, greedy (arXiv 2606.04446): 7.05.
    return {"step_ms": step, **{name: value / step for name, value in times.items()}, "speedup_at_7.05": 7.05 / total}


def demo(build: Path, limit: int, tokens: int) -> dict[str, Any]:
    """How fast a build decodes plainly, by DFlash and by D²SD (``benchmarks/speed.py``): its samples.

    Raises:
        CalledProcessError: the build cannot be run here; the reason was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "speed.jsonl"
        command = [sys.executable, "-m", "benchmarks.speed", str(build), "--samples", str(samples), "--rounds", "1"]
        command += ["--groups", "task", "--modes", "dflash", "d2sd", "auto", "--limit", str(limit), "--tokens", str(tokens)]
        subprocess.run(command, check=True)
        return {"samples": [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]}


class Results:
    """The tables of a device in a file, saved after every step; a further run on the same device goes on with them."""

    def __init__(self, folder: Path, device: str) -> None:
        sources = Path(kernel.__file__), Path(sys.modules[write_rows.__module__].__file__ or "")
        code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
        made_by = {"device": device, "torch": torch.__version__, "kernel": code}
        self.path = folder / f"kernel-{''.join(c if c.isalnum() else '-' for c in device.lower())}.json"
        self.tables: dict[str, Any] = {}
        if self.path.exists():
            self.tables = json.loads(self.path.read_text(encoding="utf-8"))
        if {name: self.tables.get(name) for name in made_by} != made_by:
            self.tables = {"date": datetime.date.today().isoformat(), **made_by}
        folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        self.path.write_text(json.dumps(self.tables, indent=1) + "\n", encoding="utf-8")

    def fill(self, table: str, cases: list[Case], measure: Callable[..., dict[str, Any]], device: str) -> list[dict[str, Any]]:
        """Measure the cases that the table lacks; returns their rows and those that it had."""
        rows = self.tables.setdefault(table, [])
        had = {tuple(row[name] for name in ("model", "prefix", "batch", "nodes")) for row in rows}
        for heads, prefix, batch, nodes in cases:
            if (heads.name, prefix, batch, nodes) in had:
                continue
            measured = measure(heads, prefix, batch, nodes, device)
            rows.append({"model": heads.name, "prefix": prefix, "batch": batch, "nodes": nodes, **measured})
            self.save()
            print(
                table, " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
            )
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two prefixes and one batch alone")
    parser.add_argument("--build", type=Path, metavar="DIR", help="a build directory that answers too")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each evaluation task for --build (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer of --build (default: 64)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the tables")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not kernel.INTERPRETED.value:
        parser.error("no GPU here; TRITON_INTERPRET=1 runs the checks in Triton's interpreter")
    if args.build:
        try:
            BuildDirectory.open(args.build)
        except BuildDirectoryError as error:
            parser.error(str(error))
    device, name = ("cuda", torch.cuda.get_device_name()) if gpu else ("cpu", "Triton's interpreter")
    prefixes, batches, nodes = [128, 1024, 4096, 32768], [1, 8, 32], [16, 48, 80]
    if args.quick:
        prefixes, batches = [1024, 4096], [1]
    if not gpu:
        prefixes, batches, nodes = [128, 384], [1, 3], [16, 80]
    cases: list[Case] = list(product(MODELS, prefixes, batches, nodes))
    results = Results(args.output, name)
    checks = results.fill("checks", cases, check, device)
    if args.build:
        try:
            results.tables["demo"] = demo(args.build, args.limit, args.tokens)
        except subprocess.CalledProcessError as error:
            return error.returncode
        results.save()
    if gpu:
        results.tables["cycle"] = cycle(device, 2048)
        results.save()
        print(results.tables["cycle"], flush=True)
        results.fill("times", cases, time, device)
    bad = [row for row in checks if not passes(row)]
    print(f"{len(checks)} checks, {len(bad)} failed; written to {results.path}")
    for row in bad:
        print(f"failed: {row}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
