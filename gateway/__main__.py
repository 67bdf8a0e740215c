"""``python -m gateway``: OpenAI's interface to a served pipeline."""

import argparse
import logging
import os
import socket
import sys
from pathlib import Path

import uvicorn

from gateway.app import Settings, create
from gateway.limits import Keys, KeysError
from gateway.replicas import Replicas

DRAIN_WITHIN = 120  # seconds that running answers have to end in, after SIGTERM
# Seconds that a connection may idle: longer than what stands before us keeps one (Caddy 120), which else might send a request
# into a connection that is just being closed.
KEEP_ALIVE = 130


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument(
        "--triton",
        action="append",
        metavar="HOST:PORT",
        help="Triton's gRPC address (default: 127.0.0.1:8001); may be repeated, and a name may have several addresses",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=9000, help="0 for any free one (default: %(default)s)")
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="what the model is called (default: d2sd); may be repeated"
    )
    parser.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="YAML list of keys and their limits (default: everybody may ask)"
    )
    parser.add_argument(
        "--body-limit", type=int, default=Settings.body_limit, metavar="BYTES", help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=Settings.at_once,
        metavar="N",
        help="requests answered at once, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--nice",
        type=int,
        choices=range(20),
        default=4,
        metavar="0..19",
        help="how far it stands back for engines on the same cores, as nice(1) counts (default: %(default)s)",
    )
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="(default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    for name in args.triton or []:
        if not name.rpartition(":")[0] or not name.rpartition(":")[2].isdecimal():
            parser.error(f"--triton: found {name}, allowed: HOST:PORT")
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        keys = Keys.read(args.api_keys) if args.api_keys else Keys()
        listening = socket.create_server((args.host, args.port), backlog=2048)
    except KeysError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot listen on {args.host}:{args.port}: {error.strerror}", file=sys.stderr)
        return 1
    os.nice(args.nice)
    settings = Settings(tuple(args.model or Settings.models), args.body_limit, args.at_once)
    app = create(Replicas(args.triton or ["127.0.0.1:8001"]), keys, settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=DRAIN_WITHIN,
        timeout_keep_alive=KEEP_ALIVE,
    )
    print(f"ready: http://{args.host}:{listening.getsockname()[1]}/v1; Ctrl-C stops it", flush=True)
    uvicorn.Server(config).run([listening])
    return 0


if __name__ == "__main__":
    sys.exit(main())
