"""``python -m client "prompt"``: ask a served pipeline from the command line."""

import argparse
import json
import sys
import time
from pathlib import Path

from client import trace
from client.client import USUAL, Client, Message, Options, ServiceError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m client", description=__doc__)
    parser.add_argument("prompt", help="the user's message; - reads it from standard input")
    parser.add_argument("--raw", action="store_true", help="send the prompt as it stands, without the chat template")
    parser.add_argument("--parse-special", action="store_true", help="with --raw: control tokens written in it are such tokens")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--stream", action="store_true", help="print the answer as it arrives")
    parser.add_argument("--max-tokens", type=int, help="length of the answer, at most")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that together reach p")
    parser.add_argument("--seed", type=int, help="of the draws")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    parser.add_argument("--mode", help="decoding mode instead of the pipeline's, autoregressive for one")
    parser.add_argument("--http", action="store_true", help="ask over HTTP instead of gRPC")
    parser.add_argument("--address", help=f"host:port (default: {USUAL['grpc']}, with --http {USUAL['http']})")
    parser.add_argument("--json", action="store_true", help="print the answer and its figures as JSON")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="how the answer came about: .html is a page, .json for Perfetto"
    )
    args = parser.parse_args(arguments)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    messages: list[Message] = [{"role": "user", "content": text}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    options = Options(
        *(args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed, args.stop),
        mode=args.mode,
        parse_special=args.parse_special or None,
        trace=args.trace is not None or None,
    )
    client = Client(args.address, "http" if args.http else "grpc")
    prompt = text if args.raw else messages
    began = time.monotonic()
    try:
        if args.trace:
            trace.check(args.trace)
        if args.stream and not args.json:
            for piece in client.stream(prompt, options):
                print(piece.text, end="", flush=True)
            print()
            answer = piece
        else:
            answer = client.generate(prompt, options)
            if not args.json:
                print(answer.text)
        if args.trace and answer.trace is not None:
            trace.write(answer.trace, args.trace, text)
    except (ServiceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    seconds = time.monotonic() - began
    if args.json:
        figures = {"text": answer.text, "output_tokens": answer.output_tokens, "cycles": answer.cycles}
        print(json.dumps(figures | {"finish_reason": answer.finish_reason, "seconds": round(seconds, 3)}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
