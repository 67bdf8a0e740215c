"""The cascade-attention kernel on a GPU: checked against the f32 reference, timed beside other ways, a cycle's cost predicted.

Without a GPU only the checks run, on smaller shapes, in Triton's interpreter: with TRITON_INTERPRET=1 set. A build given with
--build answers the evaluation's prompts as well, on whatever runtime it has here: the same answers in both modes, and how fast.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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


def tree_mask(nodes: int, generator: torch.Generator) -> Tensor:
    """Ancestors and self in a random tree of ``nodes`` nodes: ``[N, N]`` bool."""
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = int(torch.randint(max(0, node - GAMMA), node, (1,), generator=generator))
        mask[node] |= mask[parent]
    return mask


def inputs(heads: Heads, batch: int, nodes: int, prefix: int, device: str) -> list[Any]:
    """Random arguments of the operator in bf16, its cache a quarter larger than the prefix."""
    g = torch.Generator().manual_seed(prefix + nodes)
    capacity = prefix + prefix // 4

    def draw(count: int, rows: int) -> Tensor:
        return torch.randn(batch, count, rows, heads.size, generator=g).to(device, torch.bfloat16)

    lengths = torch.full((batch,), prefix)
    lengths[1:] -= torch.randint(0, prefix // 2, (batch - 1,), generator=g)
    mask = torch.stack([tree_mask(nodes, g) for _ in range(batch)])
    tensors = [draw(heads.query, nodes), *(draw(heads.kv, rows) for rows in (nodes, nodes, capacity, capacity))]
    return [*tensors, lengths.to(device), mask.to(device), heads.size**-0.5]


def in_f32(arguments: list[Any]) -> list[Any]:
    """The arguments, bf16 tensors in f32."""
    return [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def check(device: str, prefixes: list[int], nodes: list[int], batches: list[int]) -> Iterator[dict[str, Any]]:
    """Relative errors of the kernel, whether a repeated call gives the same bits, and the cache write."""
    for heads in MODELS:
        for prefix in prefixes:
            for batch in batches:
                for n in nodes:
                    arguments = inputs(heads, batch, n, prefix, device)
                    options: dict[str, Any] = {
                        "window": heads.window,
                        "sinks": torch.linspace(-1, 1, heads.query, device=device) if heads.sinks else None,
                    }
                    exact = reference.cascade_attention(*in_f32(arguments), **options)
                    found = kernel.cascade_attention(*arguments, **options)
                    again = kernel.cascade_attention(*arguments, **options)
                    new, cache, lengths = arguments[1], arguments[3], arguments[5]
                    rows = torch.stack([torch.randperm(n)[: min(n, GAMMA)] for _ in range(batch)]).to(device)
                    counts = torch.randint(0, rows.shape[1] + 1, (batch,)).to(device)
                    expected = cache.clone()
                    for b, (start, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
                        expected[b, :, start : start + count] = new[b, :, rows[b, :count]]
                    write_rows(new[None], rows, counts, lengths, cache[None])
                    yield {
                        "model": heads.name,
                        "prefix": prefix,
                        "batch": batch,
                        "nodes": n,
                        "error": float((found.float() - exact).norm() / exact.norm()),
                        "repeatable": torch.equal(found, again),
                        "cache_write": torch.equal(cache, expected),
                    }


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


def time(device: str, prefixes: list[int], nodes: list[int], batches: list[int]) -> Iterator[dict[str, Any]]:
    """Milliseconds of the kernel and of the other ways, and the share of the copy bandwidth that reading the prefix reaches."""
    for heads in MODELS:
        plain = Heads(heads.name, heads.query, heads.kv, heads.size)  # what the other ways can do too
        for prefix in prefixes:
            for batch in batches:
                size = 2 * batch * heads.kv * prefix * heads.size * 2  # bytes of K and V
                if size > 2**34:
                    continue
                source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
                copy = milliseconds(partial(target.copy_, source))  # reads and writes them: twice the traffic
                for n in nodes:
                    arguments = inputs(plain, batch, n, prefix, device)
                    arguments[5].fill_(prefix)
                    row: dict[str, Any] = {"model": heads.name, "prefix": prefix, "batch": batch, "nodes": n}
                    ways: dict[str, Callable[[], Any]] = {
                        "kernel": partial(kernel.cascade_attention, *arguments),
                        "sdpa": masked_sdpa(*arguments),
                        "flex": flex(*arguments),
                        "branches": branches(*whole_branches(plain, batch, prefix, device)),
                    }
                    for name, way in ways.items():
                        row[name] = milliseconds(way)
                    row["copy_bandwidth_share"] = copy / 2 / row["kernel"]
                    yield row


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
    """Greedy answers of a build by plain decoding, DFlash and D²SD (``speed_grid.py``): how many are alike, and how fast.

    Raises:
        CalledProcessError: the build cannot be run here; the reason was printed.
    """
    options = BuildDirectory.open(build).manifest["decoding"]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "grid.json"
        command = [sys.executable, str(Path(__file__).with_name("speed_grid.py")), str(build), "--json", str(table)]
        command += ["--gamma", str(options["block_size"]), "--branches", str(options["branches"])]
        subprocess.run([*command, "--limit", str(limit), "--tokens", str(tokens)], check=True)
        return dict(json.loads(table.read_text(encoding="utf-8")))


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
    prefixes, nodes, batches = [128, 1024, 4096, 32768], [16, 48, 80], [1, 8, 32]
    if args.quick:
        prefixes, batches = [1024, 4096], [1]
    if not gpu:
        prefixes, nodes, batches = [128, 384], [16, 80], [1, 3]
    checks: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "checks": checks,
    }
    kind = "".join(c if c.isalnum() else "-" for c in name.lower())
    path = args.output / f"kernel-{kind}.json"
    args.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:  # after every step: a GPU may be lent for less time than this takes
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for row in check(device, prefixes, nodes, batches):
        checks.append(row)
        save()
        print("{model} prefix {prefix} batch {batch} nodes {nodes}: error {error:.2e}".format(**row), flush=True)
    if args.build:
        try:
            results["demo"] = demo(args.build, args.limit, args.tokens)
        except subprocess.CalledProcessError as error:
            return error.returncode
        save()
    if gpu:
        results["times"] = times
        for row in time(device, prefixes, nodes, batches):
            times.append(row)
            save()
            print(" ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
        results["cycle"] = cycle(device, 2048)
        save()
        print(results["cycle"])
    bad = [r for r in checks if not (r["error"] < TOLERANCE and r["repeatable"] and r["cache_write"])]
    print(f"{len(checks)} checks, {len(bad)} failed; written to {path}")
    for row in bad:
        print(f"failed: {row}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
