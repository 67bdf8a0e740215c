"""Compile the cascade-attention kernel ahead of time for every kind of GPU, and record what each form of it takes."""

import argparse
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

from plugins.cascade_attention import compiled, kernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    known = compiled.CAPABILITIES
    parser.add_argument("--capability", type=int, nargs="+", choices=known, default=list(known), help="as in sm_90")
    parser.add_argument("--dtype", nargs="+", choices=list(compiled.DTYPES), default=list(compiled.DTYPES))
    parser.add_argument("--head-size", type=int, nargs="+", choices=kernel.HEAD_SIZES, default=list(kernel.HEAD_SIZES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    rows = []
    print("| sm | dtype | D | kernel | tile | keys | warps | stages | registers | spilled bytes | shared bytes |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for capability, dtype, head_size in product(args.capability, args.dtype, args.head_size):
        options = kernel.configs(head_size, 2, capability)
        forms = [(name, config) for config in options for name in ("attend, prefix whole", "attend, prefix cut")]
        for name, config in [*forms, ("merge", kernel.Config(kernel.MERGED, keys=0, warps=4, stages=1))]:
            if name == "merge":
                built = compiled.merge(capability, dtype, head_size, 32)
            else:
                whole = name.endswith("whole")
                built = compiled.attend(capability, dtype, head_size, 4, 8, head_size**-0.5, config, whole=whole)
            row = {"capability": capability, "dtype": dtype, "head_size": head_size, "kernel": name, **asdict(config)}
            rows.append(row | asdict(compiled.resources(built, capability)))
            print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        args.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
