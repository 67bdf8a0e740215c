"""``python -m benchmarks.load build/``: serve a build with Triton and see how it holds; writes figures, a table and a plot."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load.cases import CASES, Bench
from benchmarks.load.offline import Offline
from benchmarks.load.report import write_report
from benchmarks.load.storm import faults, plan, storm
from benchmarks.load.traffic import ROOT, Texts
from client import AsyncClient
from engines.build_directory import BuildDirectory
from engines.costs import machine
from triton_repo.prompt import Prompts
from triton_repo.serve import Ports, Server

RESULTS = ROOT / "benchmarks" / "results" / "load.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("build", type=Path, help="a build directory")
    parser.add_argument("--quick", action="store_true", help="60 requests instead of 2,000, every case once")
    parser.add_argument("--only", nargs="+", choices=["storm", *CASES], default=["storm", *CASES], help="these cases alone")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and texts (default: 0)")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="figures; other cases in it are kept")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "load.md", metavar="FILE", help="table, with a plot")
    args = parser.parse_args()
    directory = BuildDirectory.open(args.build)
    prompts = Prompts(directory.tokenizer)
    texts = Texts(prompts, args.seed)
    own = directory.manifest["decoding"]["mode"]
    modes = [own] if own == "autoregressive" else [own, "autoregressive"]
    crossed = modes if "first" not in directory.manifest["graphs"] else [*modes, "d2sd"]
    planned = plan(texts, 60 if args.quick else 2000, crossed, args.seed)
    figures: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    ran_on = f"{machine()}; {_described(directory)}{'; --quick' if args.quick else ''}"
    offline = None
    if "storm" in args.only:
        print("answering offline …", flush=True)
        distinct = {p.prompt: prompts.text(p.prompt) for p in planned}
        offline = Offline(args.build, distinct.items(), max(p.options.max_tokens or 0 for p in planned if not p.wrong))
    log = args.build / "triton.log"
    with Server(args.build, "127.0.0.1", Ports(0, 0, 0), log) as server:
        server.wait_until_ready()

        async def metrics() -> str:
            async with httpx.AsyncClient() as session:
                return (await session.get(f"http://127.0.0.1:{server.ports.metrics}/metrics")).text

        async def run() -> None:
            async with AsyncClient(f"127.0.0.1:{server.ports.grpc}", timeout=600) as client:
                bench = Bench(client, f"127.0.0.1:{server.ports.http}", texts, modes, args.quick)
                await bench.short()  # meet the shapes
                for name in args.only:
                    print(f"{name} …", flush=True)
                    if name == "storm":
                        assert offline is not None
                        slots = directory.manifest["limits"]["sequences"]
                        figures[name] = await storm(client, planned, offline, server.process.pid, slots, metrics)
                    else:
                        figures[name] = await CASES[name](bench)
                    figures.setdefault("ran_on", {})[name] = ran_on
                    shown = {key: value for key, value in figures[name].items() if key != "memory_mib"}
                    print(f"{name}: {json.dumps(shown)}", flush=True)
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

        asyncio.run(run())
    write_report(figures, args.report)
    found = faults(figures["storm"]) if "storm" in args.only else []
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if found else 0


def _described(directory: BuildDirectory) -> str:
    """A build, in words."""
    manifest = directory.manifest
    engine, weights = manifest["engine"], manifest["graphs"]["target"].get("weights") or {}
    return (
        f"{engine['backend']}, precision {engine['precision']}, the target's weights {weights.get('form', 'f32')}, "
        f"mode {manifest['decoding']['mode']}"
    )


if __name__ == "__main__":
    sys.exit(main())
